-- release: end a lock before its deadline, for its owner or for the orders-service.
--
-- KEYS[1] counts     hash
-- KEYS[2] deadlines  zset
-- KEYS[3] ended      zset
-- KEYS[4] settling   zset
-- KEYS[5] sold       zset
-- KEYS[6] holders    hash
-- KEYS[7] lock       hash
-- ARGV[1] channel    text
-- ARGV[2] lock       text
-- ARGV[3] by         text    "owner": active locks only. "orders": also a confirmed one whose order is not reported
-- ARGV[4] user       integer "" when the caller does not say
-- ARGV[5] session    text    the owner's socket that has its own answer; "" when none
--
-- RETURNS one of
--   {"released", "user category quantity created_ms deadline_ms held_ms", session, order}   held_ms: how long it was active,
--                                      -1 when it had been confirmed
--   {"already_released", "user category quantity created_ms deadline_ms -1", session, order}   by the same releaser; nothing
--                                      changed
--   {"released_by_other"} {"confirmed"} {"wrong_user"} {"expired"} {"not_found"}        nothing changed
--
-- COST O(log n) in active locks of the event; 5 reads, 7 writes, 2 publishes.

expire_due()
local user, category, quantity, created, session, status =
  unpack(redis.call('HMGET', KEYS[7], 'u', 'c', 'q', 't', 's', 'status'))
if not user then return {'not_found'} end
if ARGV[4] ~= '' and ARGV[4] ~= user then return {'wrong_user'} end
local member = member_of(ARGV[2], category, quantity, user)
local facts = user .. ' ' .. category .. ' ' .. quantity .. ' ' .. created .. ' '
local deadline, order, held = nil, '', '-1'
local row = load(category)

if status then
  local ended = redis.call('HMGET', KEYS[7], 'deadline_ms', 'order', 'releaser')
  deadline, order = ended[1], ended[2] or ''
  if status == 'released' then
    if ended[3] ~= ARGV[3] then return {'released_by_other'} end
    return {'already_released', facts .. deadline .. ' ' .. held, session, order}
  end
  if ARGV[3] == 'owner' or not redis.call('ZSCORE', KEYS[4], member) then return {'confirmed'} end
  redis.call('ZREM', KEYS[4], member)
  stop_waiting(user, category, ARGV[2])
  redis.call('HINCRBY', KEYS[1], '#confirmed', '-1')
  hold(user, 0, -quantity)
  if row then row.settling = math.max(0, row.settling - quantity) end
else
  deadline = redis.call('ZSCORE', KEYS[2], member)
  if not deadline or tonumber(deadline) <= now then return {'expired'} end
  held = now - created
  redis.call('ZREM', KEYS[2], member)
  hold(user, -1, -quantity, user .. ':' .. category)
  if row then row.active = math.max(0, row.active - quantity) end
end
redis.call('HINCRBY', KEYS[1], '#released', '1')
redis.call('HSET', KEYS[7], 'status', 'released', 'releaser', ARGV[3], 'deadline_ms', deadline)
redis.call('PEXPIRE', KEYS[7], TOMBSTONE_MS)
-- The counts have the lifetime that the lock gave them, unless they were lost since.
if row then save(row, ' released:' .. quantity .. ':' .. user) else keep(KEYS[1]) end
tell(user, 'released ' .. ARGV[2] .. ' ' .. category .. ' ' .. quantity .. ' released ' .. (ARGV[5] == '' and '-' or ARGV[5]))
return {'released', facts .. deadline .. ' ' .. held, session, order}
