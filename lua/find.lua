-- find: one lock as it stands.
--
-- KEYS[1] book       hash
-- KEYS[2] deadlines  zset
-- KEYS[3] ended      zset
-- KEYS[4] lock       string
-- ARGV[1] channel    text
-- ARGV[2] lock       text
--
-- RETURNS one of
--   {"found", status, user, category, quantity, created_ms, deadline_ms, version, session, order}   session: "-" for none
--   {"not_found"}
--
-- COST O(1); 1 to 3 reads. In a wave of expiries it may have to write down the ends of others first.

local text = redis.call('GET', KEYS[4])
if not text then return {'not_found'} end
local facts, user, category, quantity, created, ended = string.match(text, FACTS)
local version, session = string.match(facts, ' (%d+) (%S+)$')
local status, deadline, _, order = string.match(ended, END)
if not status then
  status = 'active'
  local member = member_of(ARGV[2], category, quantity, user)
  deadline = redis.call('ZSCORE', KEYS[2], member)
  if not deadline or tonumber(deadline) <= now then
    status = 'expired'
    deadline = deadline or redis.call('ZSCORE', KEYS[3], member)
    while not deadline and expire_due(true) > 0 do deadline = redis.call('ZSCORE', KEYS[3], member) end
    if not deadline then return {'not_found'} end
  end
end
return {'found', status, user, category, quantity, created, deadline, version, session, order or ''}
