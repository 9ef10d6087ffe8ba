-- visit: note that a user may have locks in an event. Written before the lock, so the index is never too small.
--
-- KEYS[1] user    hash   of what is in it, "e:<event>" -> when the user last tried there, ms
-- ARGV[1] event   integer
--
-- RETURNS
--   {"visited"}
--
-- COST O(1); 2 reads, 1 or 2 writes. When there are more than 1,100 fields, O(f log f) once for the next hundred events:
-- the 1,000 latest stay.

local EVENTS_MAX = 1000
local clock = redis.call('TIME')
redis.call('HSET', KEYS[1], 'e:' .. ARGV[1], string.format('%d', clock[1] * 1000 + math.floor(clock[2] / 1000)))
if redis.call('PTTL', KEYS[1]) < 90000000 then redis.call('PEXPIRE', KEYS[1], 90000000) end
if redis.call('HLEN', KEYS[1]) > EVENTS_MAX + 100 then
  local all, tries = redis.call('HGETALL', KEYS[1]), {}
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 2) == 'e:' then tries[#tries + 1] = { field = all[i], ms = tonumber(all[i + 1]) } end
  end
  table.sort(tries, function(one, other) return one.ms < other.ms end)
  for i = 1, #tries - EVENTS_MAX do redis.call('HDEL', KEYS[1], tries[i].field) end
end
return {'visited'}
