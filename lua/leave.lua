-- leave: a session of the user ended, or all of them on a replica that died.
--
-- KEYS[1] user       hash   session -> "replica generation"; "#" -> generation; "e:<event>" -> last try
-- KEYS[2] told       zset   messages by when they were told last, ms; those that the last session has shown are dropped
-- ARGV[1] session    text   "" for all of the replica's
-- ARGV[2] replica    text   the session's
-- ARGV[3] before_us  integer with no session given: those that began before this
-- ARGV[4] silent_ms  integer how long a session may stand open whose client is gone
--
-- RETURNS
--   {"left", generation, remaining, here, found_us}
--     remaining: the user's other sessions, on all replicas; here: on this one; found_us: the time of this finding
--
-- COST O(s) in the user's sessions and events; 2 reads, 2 writes, one for each session that ended and one with the last.

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local ended = ARGV[1] == '' and 0 or redis.call('HDEL', KEYS[1], ARGV[1])
local last, remaining, here = 0, 0, 0
local sessions = redis.call('HGETALL', KEYS[1])
for i = 1, #sessions, 2 do
  if sessions[i] == '#' then
    last = tonumber(sessions[i + 1])
  elseif string.sub(sessions[i], 1, 2) ~= 'e:' then
    local replica, began = string.match(sessions[i + 1], '^(%S+) (%d+)$')
    if ARGV[1] == '' and replica == ARGV[2] and tonumber(began) < tonumber(ARGV[3]) then
      ended = ended + redis.call('HDEL', KEYS[1], sessions[i])
    else
      remaining = remaining + 1
      if replica == ARGV[2] then here = here + 1 end
    end
  end
end
local generation = string.format('%d', math.max(last + 1, now_us))
redis.call('HSET', KEYS[1], '#', generation)
redis.call('PEXPIRE', KEYS[1], remaining > 0 and 604800000 or 90000000)
-- A repeat, told late, says nothing of what was told since the session ended.
if ended > 0 and remaining == 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%d', now_us / 1000 - ARGV[4]))
end
return {'left', generation, remaining, here, string.format('%d', now_us)}
