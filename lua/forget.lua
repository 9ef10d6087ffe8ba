-- forget: drop events in which the user turned out to have no locks, unless the user tried there within a minute.
--
-- KEYS[1] user    hash   of what is in it, "e:<event>" -> when the user last tried there, ms
-- ARGV[1..] event integer
--
-- RETURNS
--   {"forgotten"}
--
-- COST O(k) in events given; 1 read and up to 1 write each.

local clock = redis.call('TIME')
local recent = clock[1] * 1000 - 60000
for i = 1, #ARGV do
  local tried = redis.call('HGET', KEYS[1], 'e:' .. ARGV[i])
  if tried and tonumber(tried) < recent then redis.call('HDEL', KEYS[1], 'e:' .. ARGV[i]) end
end
return {'forgotten'}
