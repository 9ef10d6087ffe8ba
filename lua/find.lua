-- find: one lock as it stands.
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
--
-- RETURNS one of
--   {"found", status, user, category, quantity, created_ms, deadline_ms, version, session, order}
--   {"not_found"}
--
-- COST O(1); 1 to 3 reads. In a wave of expiries it may have to write down the ends of others first.

local lock = redis.call('HMGET', KEYS[7], 'u', 'c', 'q', 't', 'v', 's', 'status', 'deadline_ms', 'order')
local user, category, quantity, status, deadline = lock[1], lock[2], lock[3], lock[7], lock[8]
if not user then return {'not_found'} end
if not status then
  status = 'active'
  local member = member_of(ARGV[2], category, quantity, user)
  deadline = redis.call('ZSCORE', KEYS[2], member)
  if not deadline or tonumber(deadline) <= now then
    status = 'expired'
    deadline = deadline or redis.call('ZSCORE', KEYS[3], member)
    while not deadline and catch_up() do deadline = redis.call('ZSCORE', KEYS[3], member) end
    if not deadline then return {'not_found'} end
  end
end
return {'found', status, user, category, quantity, lock[4], deadline, lock[5], lock[6] or '', lock[9] or ''}
