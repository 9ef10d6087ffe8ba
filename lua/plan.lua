-- plan: say when the sweep should look at a claimed event again, or that it need not.
--
-- An event is dropped from the index only when it was not touched for a minute: every request is answered or given up
-- long before that. A touch made while the event was claimed may be ahead of its lock, so the next look is soon. One touch
-- may also stand for locks of the next 20 s that are due in 10 s at the earliest (`ledger::recent`): for 30 s after it the
-- event is looked at every 5 s.
--
-- KEYS[1] due         zset   events by when the sweep should look, ms
-- KEYS[2] events      zset   events by when they were last touched, ms
-- ARGV[1] event       integer
-- ARGV[2] in_ms       integer -1 when nothing in the event will be due
-- ARGV[3] claimed_ms  integer the claim's score: a lower one means that somebody touched it since
-- ARGV[4] claim_ms    integer how far into the future a claim is made
--
-- RETURNS one of
--   {"planned", wait_ms}
--   {"dropped"}
--
-- COST O(log e) in events; 2 reads, 1 write.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local wait = tonumber(ARGV[2])
local touched = tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]) or 0)
if wait < 0 then
  if now - touched > 60000 then
    redis.call('ZREM', KEYS[1], ARGV[1])
    return {'dropped'}
  end
  wait = 5000
end
if now - touched < 30000 then wait = math.min(wait, 5000) end
if touched >= ARGV[3] - ARGV[4] then wait = math.min(wait, 100) end
local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
local mode = score and tonumber(score) == tonumber(ARGV[3]) and 'CH' or 'LT'
redis.call('ZADD', KEYS[1], mode, string.format('%d', now + wait), ARGV[1])
return {'planned', wait}
