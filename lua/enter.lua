-- enter: a session of the user began, or is still there.
--
-- KEYS[1] user       hash    session -> "replica generation"; "#" -> generation; "e:<event>" -> last try
-- KEYS[2] told       zset    messages by when they were told last, ms
-- ARGV[1] session    text
-- ARGV[2] replica    text
-- ARGV[3] keep_ms    integer how long a message is kept
-- ARGV[4] silent_ms  integer how long a session may stand open whose client is gone
--
-- RETURNS
--   {"entered", generation, now_ms, seen_ms, {at_ms, message}, ...}
--     generation: rises with every coming and going, also across loss of all data; what was told and kept, in order;
--     seen_ms: what was told up to then, another session that is open has shown; 0 when none is, or nothing is kept
--
-- COST O(1), 2 reads, 2 writes; with messages kept O(s) in the user's sessions and events, and one read more.

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now = math.floor(now_us / 1000)
local told = redis.call('ZRANGEBYSCORE', KEYS[2], string.format('%d', now - ARGV[3]), '+inf', 'WITHSCORES')
local seen = 0
local sessions = #told > 0 and redis.call('HGETALL', KEYS[1]) or {}
for i = 1, #sessions, 2 do
  local field = sessions[i]
  if field ~= '#' and field ~= ARGV[1] and string.sub(field, 1, 2) ~= 'e:' then seen = now - ARGV[4] end
end
local generation = string.format('%d', math.max(tonumber(redis.call('HGET', KEYS[1], '#') or 0) + 1, now_us))
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. generation, '#', generation)
redis.call('PEXPIRE', KEYS[1], 604800000)
local reply = {'entered', generation, now, seen}
for i = 1, #told, 2 do reply[#reply + 1] = {told[i + 1], told[i]} end
return reply
