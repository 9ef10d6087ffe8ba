-- release: end a lock before its deadline, for its owner or for the orders-service.
--
-- KEYS[1] book       hash
-- KEYS[2] deadlines  zset
-- KEYS[3] ended      zset
-- KEYS[4] settling   zset
-- KEYS[5] lock       string
-- ARGV[1] lock       text
-- ARGV[2] by         text    "owner": active locks only. "orders": also a confirmed one whose order is not reported
-- ARGV[3] user       integer "" when the caller does not say
-- ARGV[4] session    text    the owner's socket that has its own answer; "-" when none
--
-- RETURNS one of the texts
--   "released user category quantity created_ms version session deadline_ms ended_ms order"   session: a dash for none;
--                                      ended_ms: now, or -1 when it had been confirmed; order: nothing for none
--   "already_released user category quantity created_ms version session deadline_ms -1 order"   by the same releaser; nothing
--                                      changed
--   "released_by_other" "confirmed" "wrong_user" "expired" "not_found"        nothing changed
--
-- COST O(log n) in active locks of the event; 2 reads, 4 writes, 2 publishes.

local text = redis.call('GET', KEYS[5])
if not text then
  expire_due()
  return 'not_found'
end
local status, deadline, releaser, order, facts = string.match(text, ENDED)
facts = facts or text
local user, category, quantity = string.match(facts, FACTS)
local field, member = user .. ':' .. category, ARGV[1] .. '|' .. category .. '|' .. quantity .. '|' .. user
local _, counts, held, sums = read(category, field, user .. ':')
local row, fewer = load(category, counts), 0
local ended_ms = '-1'
if ARGV[3] ~= '' and ARGV[3] ~= user then return 'wrong_user' end

if not status then
  -- Not by `active_of`: to make the function and to copy the lock's id takes longer than to see whether it stands there.
  deadline = string.sub(held or '', 1, #now_text)
  if deadline <= now_text or string.find(held, ARGV[1], #now_text + 2, true) ~= #now_text + 2 then return 'expired' end
  ended_ms, order = now_text, ''
  redis.call('ZREM', KEYS[2], member)
  -- What nearly everybody holds, without the reckoning.
  if sums == '1 ' .. quantity then
    fewer = 1
    redis.call('HDEL', KEYS[1], field, user .. ':')
  else
    fewer = hold(user, sums, -1, -quantity, field)
  end
  if row then row.active = math.max(0, row.active - quantity) end
else
  if status == 'released' then
    if releaser ~= ARGV[2] then return 'released_by_other' end
    return 'already_released ' .. facts .. ' ' .. deadline .. ' -1 ' .. order
  end
  if ARGV[2] == 'owner' or redis.call('ZREM', KEYS[4], member) == 0 then return 'confirmed' end
  stop_waiting(user, category, ARGV[1])
  redis.call('HINCRBY', KEYS[1], '#confirmed', '-1')
  hold(user, sums, 0, -quantity)
  if row then row.settling = math.max(0, row.settling - quantity) end
end
redis.call('SET', KEYS[5], 'released ' .. deadline .. ' ' .. ARGV[2] .. ' ' .. order .. ' ' .. facts, 'PX', TOMBSTONE_MS)
-- The counts have the lifetime that the lock gave them, unless they were lost since.
if row then
  row.users, row.released = row.users - fewer, row.released + 1
  save(row, ' released:' .. quantity .. ':' .. user)
else
  redis.call('PEXPIRE', KEYS[1], KEEP_MS)
end
tell(user, 'released ' .. ARGV[1] .. ' ' .. category .. ' ' .. quantity .. ' released ' .. ARGV[4])
return 'released ' .. facts .. ' ' .. deadline .. ' ' .. ended_ms .. ' ' .. order
