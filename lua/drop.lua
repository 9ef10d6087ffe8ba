-- drop: take a member out of an index, unless somebody has written it since it was claimed.
--
-- KEYS[1] index   zset
-- ARGV[1] member  text
-- ARGV[2] score   integer what the claim made it
--
-- RETURNS one of
--   {"dropped"}
--   {"rewritten"}   nothing changed
--
-- COST O(log n) in the index; 1 read, 1 write.

local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
if score and tonumber(score) ~= tonumber(ARGV[2]) then return {'rewritten'} end
redis.call('ZREM', KEYS[1], ARGV[1])
return {'dropped'}
