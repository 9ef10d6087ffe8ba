-- What every script about one event shares. Joined in front of each of them, but for functions that it does not call: a
-- blank line ends a part, and a part has one function at most.
--
-- KEYS[1..6] are the same in every script of an event; ARGV[1] is always the event's channel:
--
--   KEYS[1] counts     hash  <category> -> "stock total open active settling version"; and of the event:
--                            categories, counter, number, stored_ms, warned_ms, #expired, #confirmed, #released, #users,
--                            #ends (what the next sweep is told of locks that reached their deadline)
--   KEYS[2] deadlines  zset  active locks by deadline_ms; member "<lock>|<category>|<quantity>|<user>"
--   KEYS[3] ended      zset  expired locks by deadline_ms, same members: tombstones
--   KEYS[4] settling   zset  confirmed locks whose order is not reported, by settle deadline_ms, same members
--   KEYS[5] sold       zset  what the next snapshots show, by mark; the same members, or "o:<order>|<category>|<quantity>|<user>"
--   KEYS[6] holders    hash  <user>:<category> -> "lock quantity created_ms full_ms generation hold"
--                            <user>~<category> -> "lock:quantity:order ..." confirmed, order not reported
--                            <user>            -> "locks held": active locks; tickets held and confirmed
--                            kept_ms           -> when a lock last gave `counts`, `deadlines` and this key their lifetime
--                            -                 -> "member deadline_ms ...": locks whose end is not in `ended` and in the
--                                                 line above yet

-- Now, in microseconds and in milliseconds, as texts; as a number it is mostly wanted in milliseconds.
local clock = redis.call('TIME')
local now_us = clock[1] .. string.sub('00000' .. clock[2], -6)
local now_text = string.sub(now_us, 1, -4)
local now = tonumber(now_text)

-- An event's keys live this long: longer than any lock (24 h at most) and its answers (10 min more). Locks give what all of
-- them write to its lifetime anew when it was given so long ago: that leaves 40 min to spare.
local KEEP_MS = '90000000'
local RENEW_MS = 600000
-- How long an expired or released lock answers for itself.
local TOMBSTONE_MS = '600000'
-- How long a confirmed lock and a reported order answer for themselves.
local CONFIRMED_MS = '86400000'
-- The most that one call ends, warns about or settles: about 3 ms of Redis. The rest is for the next call.
local BATCH = 1000
-- The most ends that one call writes down: about 2 ms of Redis.
local BURY_MAX = 250
-- What waits for a sweep to be told of ends, in bytes: some five thousand of them. Beyond it they are not told.
local ENDS_MAX = 131072

-- Numbers go to Redis as text. Above 10^14 they lose digits in Lua's own conversion; that of redis.call writes seventeen
-- digits of all of them, which takes as long as a read.
local function int(number)
  return string.format('%d', number)
end

local function keep(key)
  redis.call('PEXPIRE', key, KEEP_MS)
end

local function member_of(lock, category, quantity, user)
  return lock .. '|' .. category .. '|' .. quantity .. '|' .. user
end

-- The counts of a category, nil when the event has none of that id. Its numbers are texts until they are reckoned with:
-- Lua reads them then, and most never are.
local function load(category)
  local text = redis.call('HGET', KEYS[1], category)
  if not text then return nil end
  local stock, total, open, active, settling, version = string.match(text, '^(%d+) (%d+) ([01]) (%d+) (%d+) (%d+)$')
  return {
    category = category, stock = stock, total = total, open = open, active = active, settling = settling,
    version = version,
  }
end

-- Stores a category's changed counts under its next version and announces both: one step. A version is the time in
-- microseconds, or the one after the last: it rises even when Redis goes on from an older copy of its data.
-- `changes` is "" or " kind:quantity:user ...". On a cluster the line with ARGV[1] is made to say SPUBLISH.
local function save(row, changes)
  local last = row.version
  -- Of texts of one length the lesser number is the lesser text.
  row.version = #last == #now_us and last < now_us and now_us or int(math.max(last + 1, tonumber(now_us)))
  local text = row.stock .. ' ' .. row.total .. ' ' .. row.open .. ' ' .. row.active .. ' ' .. row.settling .. ' ' .. row.version
  redis.call('HSET', KEYS[1], row.category, text)
  redis.call('PUBLISH', ARGV[1], row.category .. ' ' .. text .. ' ' .. now_text .. changes)
end

-- What could be locked now: the law of conservation.
local function available(row)
  if row.open == '0' then return 0 end
  return math.max(0, row.stock - row.active - row.settling)
end

local function tell(user, text)
  redis.call('PUBLISH', 'seatlock:user:' .. user, text)
end

-- A user's number of active locks, and of tickets held and confirmed, out of what `holders` says of the user.
local function sums_of(text)
  return string.match(text or '0 0', '^(%d+) (%d+)$')
end

-- Adds to both of them. With `field` that is taken out of `holders` too.
local function hold(user, locks, tickets, field)
  local locks_before, tickets_before = sums_of(redis.call('HGET', KEYS[6], user))
  local locks_after, tickets_after = math.max(0, locks_before + locks), math.max(0, tickets_before + tickets)
  if locks_after == 0 and tickets_after == 0 then
    redis.call('HDEL', KEYS[6], user, field or user)
  else
    if field then redis.call('HDEL', KEYS[6], field) end
    redis.call('HSET', KEYS[6], user, string.format('%d %d', locks_after, tickets_after))
  end
  if locks_before ~= '0' and locks_after == 0 then redis.call('HINCRBY', KEYS[1], '#users', '-1') end
end

-- A user's lock of a category as the holders hash has it, with its deadline; nil when there is none. `active` is false
-- from its deadline on. Locks that a caller ended are not in the hash.
local function held_lock(user, category)
  local text = redis.call('HGET', KEYS[6], user .. ':' .. category)
  if not text then return nil end
  local lock, quantity, created, full, generation, state = string.match(text, '^(%S+) (%d+) (%d+) (%d+) (%d+) (%a+)$')
  local member = member_of(lock, category, quantity, user)
  local deadline = tonumber(redis.call('ZSCORE', KEYS[2], member) or 0)
  return {
    lock = lock, category = category, quantity = tonumber(quantity), user = user, created = created, full = tonumber(full),
    generation = tonumber(generation), state = state, member = member, deadline = deadline, active = deadline > now,
  }
end

local function save_held(held)
  redis.call('HSET', KEYS[6], held.user .. ':' .. held.category, string.format('%s %d %s %d %d %s', held.lock,
    held.quantity, held.created, held.full, held.generation, held.state))
end

-- Writes down an active lock, of which ARGV[2] to ARGV[5] say its id, user, category and quantity; its category is saved
-- before, for the version. `locks`, `tickets` and `kept` are what `holders` said before. With `kept_ms` in it `holders` is
-- never empty, so it is not made anew, without a lifetime, while that says that it has one; `deadlines` may be.
local function write_lock(row, created, full, generation, state, session, locks, tickets, kept)
  local lock, user, category, quantity = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
  redis.call('ZADD', KEYS[2], full, member_of(lock, category, quantity, user))
  local held = lock .. ' ' .. quantity .. ' ' .. created .. ' ' .. full .. ' ' .. generation .. ' ' .. state
  redis.call('HSET', KEYS[6], user .. ':' .. category, held, user, locks + 1 .. ' ' .. tickets + quantity)
  redis.call('HSET', KEYS[7], 'u', user, 'c', category, 'q', quantity, 't', created, 'v', row.version, 's', session)
  if locks == '0' then redis.call('HINCRBY', KEYS[1], '#users', '1') end
  keep(KEYS[7])
  local is_old = not kept or math.abs(now - kept) >= RENEW_MS
  -- The first of its category may be the first of all.
  if is_old or row.active - quantity == 0 then keep(KEYS[2]) end
  if is_old then
    redis.call('HSET', KEYS[6], 'kept_ms', now_text)
    keep(KEYS[1])
    keep(KEYS[6])
  end
end

-- Writes down the end of expired locks, `text` is "lock|category|quantity|user deadline_ms " of each, and tells it to
-- rooms and owners. Their tickets are free already; `rows` has counts that are changed and not saved. What is read or
-- written of all locks is one command each: a call out of Lua costs several times the work behind it.
local function bury_expired(text, rows)
  local fields, told, ended, locks, ends = {}, {}, {}, {}, {}
  for member, category, quantity, user, deadline in string.gmatch(text, '([^|]+|(%d+)|(%d+)|(%d+)) (%d+) ') do
    local i = #locks + 1
    locks[i], told[i] = { category = category, quantity = quantity, user = user }, member
    ended[2 * i - 1], ended[2 * i] = deadline, member
    fields[2 * i - 1], fields[2 * i] = user .. ':' .. category, user
  end
  local held, holders = redis.call('HMGET', KEYS[6], unpack(fields)), {}
  for i, lock in ipairs(locks) do
    local category, quantity, user = lock.category, lock.quantity, lock.user
    local reason = string.sub(held[2 * i - 1] or '', -9) == 'abandoned' and 'abandoned' or 'expired'
    local created, deadline = string.match(held[2 * i - 1] or '', '^%S+ %d+ (%d+)'), tonumber(ended[2 * i - 1])
    ends[i] = reason .. ':' .. int(deadline - (created or deadline)) .. ':' .. int(now - deadline)
    local row = rows[category] or load(category)
    if row then
      rows[category], row.changes = row, row.changes or {}
      row.changes[#row.changes + 1] = ' ' .. reason .. ':' .. quantity .. ':' .. user
    end
    local holder = holders[user]
    if not holder then
      local active, tickets = string.match(held[2 * i] or '0 0', '^(%d+) (%d+)$')
      holder = { before = tonumber(active), active = tonumber(active), tickets = tonumber(tickets) }
      holders[user] = holder
    end
    holder.active, holder.tickets = math.max(0, holder.active - 1), math.max(0, holder.tickets - quantity)
  end
  local kept, gone, fewer = {}, {}, 0
  for user, holder in pairs(holders) do
    if holder.active == 0 and holder.tickets == 0 then
      gone[#gone + 1] = user
    else
      kept[#kept + 1], kept[#kept + 2] = user, string.format('%d %d', holder.active, holder.tickets)
    end
    if holder.before > 0 and holder.active == 0 then fewer = fewer + 1 end
  end
  if #gone > 0 then redis.call('HDEL', KEYS[6], unpack(gone)) end
  if #kept > 0 then redis.call('HSET', KEYS[6], unpack(kept)) end
  redis.call('ZADD', KEYS[3], unpack(ended))
  if fewer > 0 then redis.call('HINCRBY', KEYS[1], '#users', int(-fewer)) end
  local untold = redis.call('HGET', KEYS[1], '#ends') or ''
  if #untold < ENDS_MAX then redis.call('HSET', KEYS[1], '#ends', untold .. ' ' .. table.concat(ends, ' ')) end
  for _, row in pairs(rows) do
    save(row, table.concat(row.changes))
  end
  -- One message for all owners: a thousand would stand in the way of the rooms' news.
  redis.call('PUBLISH', 'seatlock:expired', table.concat(told, ' '))
  keep(KEYS[1])
  keep(KEYS[3])
end

-- Ends at most BATCH locks whose deadline has passed; returns how many. Of more than BURY_MAX the tickets are given back
-- and the rest is left for `catch_up`: rooms wait for the counts of those that are due next.
local function expire_due()
  if redis.call('ZCOUNT', KEYS[2], '-inf', now_text) == 0 then return 0 end
  local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_text, 'WITHSCORES', 'LIMIT', '0', int(BATCH))
  local count = #due / 2
  local rows = {}
  for i = 1, 2 * count, 2 do
    local category, quantity = string.match(due[i], '^[^|]+|(%d+)|(%d+)|')
    local row = rows[category] or load(category)
    if row then
      rows[category] = row
      row.active = math.max(0, row.active - quantity)
    end
  end
  redis.call('ZREMRANGEBYRANK', KEYS[2], 0, count - 1)
  redis.call('HINCRBY', KEYS[1], '#expired', int(count))
  local text = table.concat(due, ' ') .. ' '
  if count <= BURY_MAX then
    bury_expired(text, rows)
    return count
  end
  for _, row in pairs(rows) do
    save(row, '')
  end
  redis.call('HSET', KEYS[6], '-', (redis.call('HGET', KEYS[6], '-') or '') .. text)
  keep(KEYS[1])
  keep(KEYS[6])
  return count
end

-- Writes down the end of at most BURY_MAX locks that `expire_due` left; returns whether there were any.
local function catch_up()
  local text = redis.call('HGET', KEYS[6], '-')
  if not text then return false end
  local count, rest = 0, nil
  for after in string.gmatch(text, '%S+ %d+ ()') do
    count, rest = count + 1, after
    if count == BURY_MAX then break end
  end
  if rest > #text then
    redis.call('HDEL', KEYS[6], '-')
  else
    redis.call('HSET', KEYS[6], '-', string.sub(text, rest))
  end
  bury_expired(string.sub(text, 1, rest - 1), {})
  return true
end

-- The confirmed locks of a user and category whose order is not reported, oldest first.
local function waiting_locks(user, category)
  local found = {}
  for entry in string.gmatch(redis.call('HGET', KEYS[6], user .. '~' .. category) or '', '%S+') do
    local lock, quantity, order = string.match(entry, '^([^:]+):(%d+):(.*)$')
    found[#found + 1] = { entry = entry, lock = lock, quantity = tonumber(quantity), order = order }
  end
  return found
end

-- Forgets that a confirmed lock waits for its order.
local function stop_waiting(user, category, lock)
  local left = {}
  for _, waiting in ipairs(waiting_locks(user, category)) do
    if waiting.lock ~= lock then left[#left + 1] = waiting.entry end
  end
  if #left == 0 then
    redis.call('HDEL', KEYS[6], user .. '~' .. category)
  else
    redis.call('HSET', KEYS[6], user .. '~' .. category, table.concat(left, ' '))
  end
end

-- A confirmed lock begins to wait for the report of its order.
local function settle(lock, category, quantity, user, order, within_ms)
  redis.call('ZADD', KEYS[4], int(now + within_ms), member_of(lock, category, int(quantity), user))
  local field = user .. '~' .. category
  local waiting = redis.call('HGET', KEYS[6], field)
  local entry = lock .. ':' .. int(quantity) .. ':' .. order
  redis.call('HSET', KEYS[6], field, waiting and waiting .. ' ' .. entry or entry)
end

-- Draws a number for a question to the events-service or for a sale: higher than every one before, also than those that
-- were drawn before Redis lost them.
local function draw()
  local number = math.max(tonumber(redis.call('HGET', KEYS[1], 'counter') or 0) + 1, tonumber(now_us))
  redis.call('HSET', KEYS[1], 'counter', int(number))
  return number
end

-- Marks tickets as sold now: the first snapshot with a higher number shows them.
local function mark_sold(member)
  redis.call('ZADD', KEYS[5], int(draw()), member)
  keep(KEYS[1])
  keep(KEYS[5])
end

-- Marks those of a confirmed lock.
local function mark(lock, category, quantity, user)
  local member = member_of(lock, category, int(quantity), user)
  stop_waiting(user, category, lock)
  redis.call('ZREM', KEYS[4], member)
  mark_sold(member)
end
