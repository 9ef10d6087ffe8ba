-- sweep: end what is due in the event, warn owners, say what else is to do and when to come again.
--
-- KEYS[1] book        hash
-- KEYS[2] deadlines   zset
-- KEYS[3] ended       zset
-- KEYS[4] settling    zset
-- KEYS[5] sold        zset
-- ARGV[1] warning_ms  integer how long before its deadline a lock's owner is warned
--
-- RETURNS
--   {"swept", expired, left, refresh, next_ms, ends, {member, ...}}
--     expired: locks ended; left: 1 when the end of some is still to be written down; refresh: 1 when something waits
--     for a snapshot; next_ms: until something is due, -1 when nothing ever is; ends: " reason:held_ms:late_ms ..." of
--     every lock whose end any script wrote down since the last sweep, told once; members of `ended` whose tombstone is
--     old enough to be buried
--
-- COST O(log n + d) in active locks and what is due (1,000 of each kind at most); 6 reads and a few writes a due lock.

local expired = expire_due()
if expired == 0 then expire_due(true) end
local left = redis.call('HEXISTS', KEYS[1], '-')
local ends = redis.call('HGET', KEYS[1], '#ends')
if ends then redis.call('HDEL', KEYS[1], '#ends') end

-- Each lock is warned about once: when the horizon, which only moves on, passes its deadline.
local warning = tonumber(ARGV[1])
local warned = tonumber(redis.call('HGET', KEYS[1], 'warned_ms') or 0)
local near = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. int(math.max(warned, now)), int(now + warning), 'WITHSCORES', 'LIMIT', '0',
  int(BATCH))
local function warn(member)
  local lock, user = string.match(member, '^([^|]+)|%d+|%d+|(%d+)$')
  tell(user, 'expiring ' .. lock .. ' ' .. int(warned) .. ' ' .. int(warned - now))
end
local alike = 0
for i = 1, #near, 2 do
  local deadline = tonumber(near[i + 1])
  alike = deadline == warned and alike + 1 or 1
  warned = deadline
  warn(near[i])
end
if #near < 2 * BATCH then
  warned = math.max(warned, now + warning)
else
  -- The horizon passes the others of the last one's deadline too. They are few: a deadline is a millisecond.
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], int(warned), int(warned), 'LIMIT', int(alike), '-1')) do
    warn(member)
  end
end

local function head(key, from, shift)
  local first = redis.call('ZRANGEBYSCORE', key, from, '(inf', 'WITHSCORES', 'LIMIT', '0', '1')
  return first[2] and math.max(0, first[2] + shift - now)
end
local old = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', int(now - TOMBSTONE_MS), 'LIMIT', '0', int(BATCH))
local next_ms = left == 1 and 0 or -1
local first = head(KEYS[2], '-inf', 0)
for _, due in pairs({
  a = first, b = head(KEYS[2], '(' .. int(warned), -warning), c = head(KEYS[4], '-inf', 0),
  d = head(KEYS[3], '-inf', TOMBSTONE_MS),
}) do
  if next_ms < 0 or due < next_ms then next_ms = due end
end
if first then
  redis.call('HSET', KEYS[1], 'warned_ms', int(warned))
  keep(KEYS[1])
end
local late = redis.call('ZCOUNT', KEYS[4], '-inf', int(now))
local refresh = (late > 0 or redis.call('EXISTS', KEYS[5]) == 1) and 1 or 0
return {'swept', expired, left, refresh, next_ms, ends or '', old}
