-- leave: a session of the user ended, or all of them on a replica that died.
--
-- KEYS[1] user       hash   session -> "replica generation"; "#" -> generation; "e:<event>" -> last try
-- ARGV[1] session    text   "" for all of the replica's
-- ARGV[2] replica    text   the session's
-- ARGV[3] before_us  integer with no session given: those that began before this
--
-- RETURNS
--   {"left", generation, remaining, here, found_us}
--     remaining: the user's other sessions, on all replicas; here: on this one; found_us: the time of this finding
--
-- COST O(s) in the user's sessions and events; 2 reads, 2 writes and one for each session that ended.

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
if ARGV[1] ~= '' then redis.call('HDEL', KEYS[1], ARGV[1]) end
local last, remaining, here = 0, 0, 0
local sessions = redis.call('HGETALL', KEYS[1])
for i = 1, #sessions, 2 do
  if sessions[i] == '#' then
    last = tonumber(sessions[i + 1])
  elseif string.sub(sessions[i], 1, 2) ~= 'e:' then
    local replica, began = string.match(sessions[i + 1], '^(%S+) (%d+)$')
    if ARGV[1] == '' and replica == ARGV[2] and tonumber(began) < tonumber(ARGV[3]) then
      redis.call('HDEL', KEYS[1], sessions[i])
    else
      remaining = remaining + 1
      if replica == ARGV[2] then here = here + 1 end
    end
  end
end
local generation = string.format('%d', math.max(last + 1, now_us))
redis.call('HSET', KEYS[1], '#', generation)
redis.call('PEXPIRE', KEYS[1], remaining > 0 and 604800000 or 90000000)
return {'left', generation, remaining, here, string.format('%d', now_us)}
