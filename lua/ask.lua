-- ask: draw the number under which an answer of the events-service will be handed in.
--
-- Confirmed locks whose order was never reported are marked first, so that the answer takes them out of `settling`.
--
-- KEYS[1] book        hash
-- KEYS[2] deadlines   zset
-- KEYS[3] ended       zset
-- KEYS[4] settling    zset
-- KEYS[5] sold        zset
-- ARGV[1] age_min_ms  integer a stored snapshot at most so old is fresh enough; 0 = none is
--
-- RETURNS one of
--   {"ask", number, timed_out}   timed_out: how many confirmed locks were marked
--   {"fresh"}                    and nothing waits for a newer one; nothing changed
--
-- COST O(log n + t) in confirmed locks and those that timed out (1,000 at most); 4 reads and 2 writes, and 8 calls more
-- for each that timed out.

local UNKNOWN_MS = '60000'

local late = redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', int(now), 'LIMIT', '0', int(BATCH))
for _, member in ipairs(late) do
  local lock, category, quantity, user = string.match(member, '^([^|]+)|(%d+)|(%d+)|(%d+)$')
  mark(lock, category, quantity, user)
end
local stored = redis.call('HGET', KEYS[1], 'stored_ms')
local age_min = tonumber(ARGV[1])
if stored and age_min > 0 and now - stored <= age_min and redis.call('EXISTS', KEYS[5]) == 0 then return {'fresh'} end
local number = draw()
if stored then
  keep(KEYS[1])
else
  -- There may be no such event: nothing is kept of it unless the answer says so. A number that is gone does no harm.
  redis.call('PEXPIRE', KEYS[1], UNKNOWN_MS)
end
return {'ask', number, #late}
