-- unhost: forget users of whom the replica has no session left, unless one began since that was found.
--
-- KEYS[1] hosted  zset   users by when a session of theirs last began on the replica, us
-- ARGV[1] user     integer
-- ARGV[2] found_us integer when it was found, as `leave` said
-- ARGV[3..] the same two for each further user
--
-- RETURNS
--   {"unhosted", left}   left: users that the replica still may have sessions of
--
-- COST O(k log u) in users given and the replica's users; 1 + k reads, up to k writes.

for i = 1, #ARGV, 2 do
  local began = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if began and tonumber(began) < tonumber(ARGV[i + 1]) then redis.call('ZREM', KEYS[1], ARGV[i]) end
end
return {'unhosted', redis.call('ZCARD', KEYS[1])}
