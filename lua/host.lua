-- host: note that a replica may have sessions of a user. Written before `enter`, so the index is never too small, and after it:
-- the leaving of another of their sessions may have taken them out in between.
--
-- KEYS[1] hosted  zset   users by when a session of theirs last began on the replica, us
-- ARGV[1] user    integer
--
-- RETURNS
--   {"hosted"}
--
-- COST O(log u) in the replica's users; 2 writes.

local clock = redis.call('TIME')
redis.call('ZADD', KEYS[1], string.format('%d', clock[1] * 1000000 + clock[2]), ARGV[1])
redis.call('PEXPIRE', KEYS[1], 604800000)
return {'hosted'}
