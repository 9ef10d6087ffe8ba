-- find: one lock as it stands.
--
-- KEYS[1] book       hash
-- KEYS[2] deadlines  zset
-- KEYS[3] ended      zset
-- KEYS[4] lock       string
-- ARGV[1] lock       text
--
-- RETURNS one of
--   {"found", status, user, category, quantity, created_ms, deadline_ms, version, session, order}   session: "-" for none
--   {"not_found"}
--
-- COST O(1); 1 to 3 reads. In a wave of expiries it may have to write down the ends of others first.

local text = redis.call('GET', KEYS[4])
if not text then return {'not_found'} end
local status, deadline, _, order, facts = string.match(text, ENDED)
local user, category, quantity, created = string.match(facts or text, FACTS)
local version, session = string.match(text, ' (%d+) (%S+)$')
if not status then
  status = 'active'
  local member = member_of(ARGV[1], category, quantity, user)
  deadline = redis.call('ZSCORE', KEYS[2], member)
  if not deadline or tonumber(deadline) <= now then
    status = 'expired'
    deadline = deadline or redis.call('ZSCORE', KEYS[3], member)
    while not deadline and expire_due(true) > 0 do deadline = redis.call('ZSCORE', KEYS[3], member) end
    if not deadline then return {'not_found'} end
  end
end
return {'found', status, user, category, quantity, created, deadline, version, session, order or ''}
