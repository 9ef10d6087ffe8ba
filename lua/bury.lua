-- bury: forget expired locks whose tombstone is old enough.
--
-- KEYS[1] ended    zset
-- KEYS[2] book     hash
-- KEYS[3..] lock   string  of each member of ARGV, in the same order
-- ARGV[1..] member text   of `ended`
--
-- RETURNS
--   {"buried"}
--
-- COST O(k log n) in members given; 1 read and up to 3 writes each.

for i = 1, #ARGV do
  local lock, category, user = string.match(ARGV[i], '^([^|]+)|(%d+)|%d+|(%d+)$')
  local holder = redis.call('HGET', KEYS[2], user .. ':' .. category)
  if string.match(holder or '', '^%d+ (%S+)') == lock then redis.call('HDEL', KEYS[2], user .. ':' .. category) end
  redis.call('ZREM', KEYS[1], ARGV[i])
  redis.call('DEL', KEYS[i + 2])
end
return {'buried'}
