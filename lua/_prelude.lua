-- What every script about one event shares. Joined in front of each of them, but for functions that it does not call: a
-- blank line ends a part, and a part has one function at most.
--
-- KEYS[1..3] are the same in every script of an event, KEYS[4] and KEYS[5] where a sale is settled or shown. The book's name
-- is also that of the channel on which the event's changes are told:
--
--   KEYS[1] book       hash  <category> -> "stock total open active settling version users released": `users` is by how
--                                       many the locks and ends here made the users with locks in the event more
--                            <user>:<category> -> "deadline_ms lock quantity created_ms cut_ms generation hold"
--                            <user>~<category> -> "lock:quantity:order ..." confirmed, order not reported
--                            <user>:           -> "locks held": active locks; tickets held and confirmed
--                            and of the event: categories, counter, number, stored_ms, warned_ms, #expired, #confirmed,
--                            #ends (what the next sweep is told of locks that reached their deadline)
--                            due_ms            -> before it no lock is due, and no lifetime to be renewed
--                            -                 -> "member deadline_ms ...": locks whose end is not in `ended` and in the
--                                                 line above yet
--   KEYS[2] deadlines  zset  active locks by deadline_ms; member "<lock>|<category>|<quantity>|<user>"; and "-", never due
--   KEYS[3] ended      zset  expired locks by deadline_ms, same members: tombstones
--   KEYS[4] settling   zset  confirmed locks whose order is not reported, by settle deadline_ms, same members
--   KEYS[5] sold       zset  what the next snapshots show, by mark; the same members, or "o:<order>|<category>|<quantity>|<user>"

-- Now, in microseconds and in milliseconds, as texts; as a number it is mostly wanted in milliseconds. The texts of all
-- times until the year 2286 are of one length: the lesser time is the lesser text.
local clock = redis.call('TIME')
local now_us = clock[1] .. (#clock[2] == 6 and clock[2] or string.sub('00000' .. clock[2], -6))
local now_text = string.sub(now_us, 1, -4)
local now = now_text + 0

-- An event's keys live this long: longer than any lock (24 h at most) and its answers (10 min more). Where they are used all
-- the time they get their lifetime anew after so long: that leaves 40 min to spare.
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

-- The counts of a category, nil when the event has none of that id: out of `text`, what the book says of it, or looked up.
-- Its numbers are texts until they are reckoned with: Lua reads them then, and most never are.
local function load(category, text)
  if text == nil then text = redis.call('HGET', KEYS[1], category) end
  if not text then return nil end
  local stock, total, open, active, settling, version, users, released =
    string.match(text, '^(%d+) (%d+) ([01]) (%d+) (%d+) (%d+) (%S+) (%d+)$')
  return {
    category = category, stock = stock, total = total, open = open, active = active, settling = settling,
    version = version, users = users, released = released,
  }
end

-- Stores a category's changed counts under its next version and announces both: one step. A version is the time in
-- microseconds, or the one after the last: it rises even when Redis goes on from an older copy of its data.
-- `changes` is "" or " kind:quantity:user ..."; behind it are further fields of the book and what they become. Returns the
-- announced "stock total open active settling version now_ms". On a cluster the line with PUBLISH is made to say SPUBLISH.
local function save(row, changes, ...)
  local last = row.version
  row.version = #last == #now_us and last < now_us and now_us
    or string.format('%d', math.max(last + 1, tonumber(now_us)))
  local told = row.stock .. ' ' .. row.total .. ' ' .. row.open .. ' ' .. row.active .. ' ' .. row.settling .. ' ' .. row.version
  redis.call('HSET', KEYS[1], row.category, told .. ' ' .. row.users .. ' ' .. row.released, ...)
  told = told .. ' ' .. now_text
  redis.call('PUBLISH', KEYS[1], row.category .. ' ' .. told .. changes)
  return told
end

local function tell(user, text)
  redis.call('PUBLISH', 'seatlock:user:' .. user, text)
end

-- Adds to a user's number of active locks and of tickets held and confirmed, of which the book says `before`; returns how
-- many users fewer have a lock now. With `field` that is taken out of the book too.
local function hold(user, before, locks, tickets, field)
  local sums = user .. ':'
  local locks_before, tickets_before = string.match(before or '0 0', '^(%d+) (%d+)$')
  local locks_after, tickets_after = math.max(0, locks_before + locks), math.max(0, tickets_before + tickets)
  if locks_after == 0 and tickets_after == 0 then
    redis.call('HDEL', KEYS[1], sums, field or sums)
  else
    if field then redis.call('HDEL', KEYS[1], field) end
    redis.call('HSET', KEYS[1], sums, locks_after .. ' ' .. tickets_after)
  end
  return locks_before ~= '0' and locks_after == 0 and 1 or 0
end

-- The active lock out of what the book says of a user and category, and its deadline as text; nil when there is none.
local function active_of(text)
  local deadline = text and string.sub(text, 1, #now_text)
  if deadline and deadline > now_text then return string.match(text, '^%d+ (%S+)'), deadline end
end

-- All that the book says of a user's lock of a category; nil when that is nothing. `active` is false from its deadline on;
-- `cut` is by how much an abandonment brought that forward. Locks that a caller ended are not in the book.
local function held_lock(user, category)
  local text = redis.call('HGET', KEYS[1], user .. ':' .. category)
  if not text then return nil end
  local deadline, lock, quantity, created, cut, generation, state =
    string.match(text, '^(%d+) (%S+) (%d+) (%d+) (%d+) (%d+) (%a+)$')
  deadline = tonumber(deadline)
  return {
    lock = lock, category = category, quantity = tonumber(quantity), user = user, created = created, deadline = deadline,
    cut = tonumber(cut), generation = tonumber(generation), state = state, active = deadline > now,
  }
end

-- Writes down what is changed of an active lock.
local function save_held(held)
  redis.call('ZADD', KEYS[2], int(held.deadline), member_of(held.lock, held.category, int(held.quantity), held.user))
  redis.call('HSET', KEYS[1], held.user .. ':' .. held.category, string.format('%d %s %d %s %d %d %s', held.deadline,
    held.lock, held.quantity, held.created, held.cut, held.generation, held.state))
end

-- A lock's own key says "user category quantity created_ms version session", "-" for no session; of one that a caller ended
-- "status deadline_ms releaser order " stands in front of it, "-" for no releaser, nothing for no order. The four and the
-- rest; the first four of the other.
local ENDED = '^(%a+) (%d+) (%S+) (%S*) (.*)$'
local FACTS = '^(%d+) (%d+) (%d+) (%d+)'

-- Writes down an active lock, of which ARGV[1] to ARGV[4] say its id, user, category and quantity, under its own key, and
-- saves the counts of its category; returns what `save` does. `due` and the user's `sums` are what the book said before.
local function write_lock(key, row, changes, created, deadline, generation, state, session, due, sums)
  local lock, user, category, quantity = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
  local locks, tickets = '1', quantity
  if sums then
    locks, tickets = string.match(sums, '^(%d+) (%d+)$')
    if locks == '0' then row.users = row.users + 1 end
    locks, tickets = locks + 1, tickets + quantity
  else
    row.users = row.users + 1
  end
  row.active = row.active + quantity
  local told = save(row, changes, user .. ':' .. category,
    deadline .. ' ' .. lock .. ' ' .. quantity .. ' ' .. created .. ' 0 ' .. generation .. ' ' .. state,
    user .. ':', locks .. ' ' .. tickets)
  -- Not by `member_of`, here and in `release`: to make the function takes longer than to write this.
  redis.call('ZADD', KEYS[2], deadline, lock .. '|' .. category .. '|' .. quantity .. '|' .. user)
  redis.call('SET', key, user .. ' ' .. category .. ' ' .. quantity .. ' ' .. created .. ' ' .. row.version .. ' ' .. session,
    'PX', KEEP_MS)
  if deadline < due then redis.call('HSET', KEYS[1], 'due_ms', deadline) end
  return told
end

-- Ends at most BATCH locks whose deadline has passed; returns how many. Of more than BURY_MAX the tickets are given back
-- and the rest is left for later: rooms wait for the counts of those that are due next. With `left` it writes down the end
-- of at most BURY_MAX locks that were left so, and returns how many.
local function expire_due(left)
  -- Writes down the end of expired locks, `text` is "lock|category|quantity|user deadline_ms " of each, and tells it to
  -- rooms and owners. Their tickets are free already; `rows` has counts that are changed and not saved. What is read or
  -- written of all locks is one command each: a call out of Lua costs several times the work behind it.
  local function bury(text, rows)
    local fields, told, ended, locks, ends = {}, {}, {}, {}, {}
    for member, category, quantity, user, deadline in string.gmatch(text, '([^|]+|(%d+)|(%d+)|(%d+)) (%d+) ') do
      local i = #locks + 1
      locks[i], told[i] = { category = category, quantity = quantity, user = user }, member
      ended[2 * i - 1], ended[2 * i] = deadline, member
      fields[2 * i - 1], fields[2 * i] = user .. ':' .. category, user .. ':'
    end
    local held, holders = redis.call('HMGET', KEYS[1], unpack(fields)), {}
    for i, lock in ipairs(locks) do
      local category, quantity, user = lock.category, lock.quantity, lock.user
      local reason = string.sub(held[2 * i - 1] or '', -9) == 'abandoned' and 'abandoned' or 'expired'
      local created, deadline = string.match(held[2 * i - 1] or '', '^%d+ %S+ %d+ (%d+)'), tonumber(ended[2 * i - 1])
      ends[i] = reason .. ':' .. deadline - (created or deadline) .. ':' .. now - deadline
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
      holder.row = row
    end
    local kept, gone = {}, {}
    for user, holder in pairs(holders) do
      if holder.active == 0 and holder.tickets == 0 then
        gone[#gone + 1] = user .. ':'
      else
        kept[#kept + 1], kept[#kept + 2] = user .. ':', holder.active .. ' ' .. holder.tickets
      end
      if holder.row and holder.before > 0 and holder.active == 0 then holder.row.users = holder.row.users - 1 end
    end
    if #gone > 0 then redis.call('HDEL', KEYS[1], unpack(gone)) end
    if #kept > 0 then redis.call('HSET', KEYS[1], unpack(kept)) end
    redis.call('ZADD', KEYS[3], unpack(ended))
    local untold = redis.call('HGET', KEYS[1], '#ends') or ''
    if #untold < ENDS_MAX then redis.call('HSET', KEYS[1], '#ends', untold .. ' ' .. table.concat(ends, ' ')) end
    for _, row in pairs(rows) do
      save(row, table.concat(row.changes))
    end
    -- One message for all owners: a thousand would stand in the way of the rooms' news.
    redis.call('PUBLISH', 'seatlock:expired', table.concat(told, ' '))
    redis.call('PEXPIRE', KEYS[1], KEEP_MS)
    redis.call('PEXPIRE', KEYS[3], KEEP_MS)
    return #locks
  end
  if left then
    local text = redis.call('HGET', KEYS[1], '-')
    if not text then return 0 end
    local count, rest = 0, nil
    for after in string.gmatch(text, '%S+ %d+ ()') do
      count, rest = count + 1, after
      if count == BURY_MAX then break end
    end
    if rest > #text then
      redis.call('HDEL', KEYS[1], '-')
    else
      redis.call('HSET', KEYS[1], '-', string.sub(text, rest))
    end
    return bury(string.sub(text, 1, rest - 1), {})
  end
  if redis.call('ZCOUNT', KEYS[2], '-inf', now_text) == 0 then return 0 end
  local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_text, 'WITHSCORES', 'LIMIT', '0', BATCH)
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
  redis.call('HINCRBY', KEYS[1], '#expired', count)
  local text = table.concat(due, ' ') .. ' '
  if count <= BURY_MAX then return bury(text, rows) end
  for _, row in pairs(rows) do
    save(row, '')
  end
  redis.call('HSET', KEYS[1], '-', (redis.call('HGET', KEYS[1], '-') or '') .. text)
  redis.call('PEXPIRE', KEYS[1], KEEP_MS)
  return count
end

-- What the book says when all that is due has ended (but for what is more than one call ends): `due_ms`, then the fields
-- asked for. Before `due_ms` nothing is to be done: no lock is due and no lifetime to be renewed.
local function read(...)
  local said = redis.call('HMGET', KEYS[1], 'due_ms', ...)
  if not said[1] or said[1] <= now_text then
    expire_due()
    if redis.call('HEXISTS', KEYS[1], 'stored_ms') == 1 then
      local first = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]
      redis.call('HSET', KEYS[1], 'due_ms', string.format('%d', math.min(first or math.huge, now + RENEW_MS)))
      -- Its last lock takes a set away, and its lifetime with it: this one stays.
      redis.call('ZADD', KEYS[2], 'inf', '-')
      redis.call('PEXPIRE', KEYS[1], KEEP_MS)
      redis.call('PEXPIRE', KEYS[2], KEEP_MS)
    end
    said = redis.call('HMGET', KEYS[1], 'due_ms', ...)
  end
  return unpack(said)
end

-- The confirmed locks of a user and category whose order is not reported, oldest first.
local function waiting_locks(user, category)
  local found = {}
  for entry in string.gmatch(redis.call('HGET', KEYS[1], user .. '~' .. category) or '', '%S+') do
    local lock, quantity, order = string.match(entry, '^([^:]+):(%d+):(.*)$')
    found[#found + 1] = { lock = lock, quantity = tonumber(quantity), order = order }
  end
  return found
end

-- Forgets that a confirmed lock waits for its order.
local function stop_waiting(user, category, lock)
  local field, left = user .. '~' .. category, {}
  for entry, its in string.gmatch(redis.call('HGET', KEYS[1], field) or '', '(([^: ]+):%S+)') do
    if its ~= lock then left[#left + 1] = entry end
  end
  if #left == 0 then
    redis.call('HDEL', KEYS[1], field)
  else
    redis.call('HSET', KEYS[1], field, table.concat(left, ' '))
  end
end

-- A confirmed lock begins to wait for the report of its order.
local function settle(lock, category, quantity, user, order, within_ms)
  redis.call('ZADD', KEYS[4], int(now + within_ms), member_of(lock, category, int(quantity), user))
  local field = user .. '~' .. category
  local waiting = redis.call('HGET', KEYS[1], field)
  local entry = lock .. ':' .. int(quantity) .. ':' .. order
  redis.call('HSET', KEYS[1], field, waiting and waiting .. ' ' .. entry or entry)
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
