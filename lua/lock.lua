-- lock: grant tickets of a category to a user until a deadline, or say why not.
--
-- KEYS[1] counts      hash
-- KEYS[2] deadlines   zset
-- KEYS[3] ended       zset
-- KEYS[4] settling    zset
-- KEYS[5] sold        zset
-- KEYS[6] holders     hash
-- KEYS[7] lock        hash    u user, c category, q quantity, t created_ms, v version, s session, and once it ended
--                             by a caller: status, deadline_ms, order, releaser; TTL key. There are many: short names
--                             save 64 bytes of each
-- KEYS[8] request     string  "lock category quantity version" of a request id; KEYS[7] again when there is none
-- KEYS[9] rate        string  theoretical arrival time_us of the user's next try; TTL key
-- ARGV[1] channel     text
-- ARGV[2] lock        text    the new lock's id
-- ARGV[3] user        integer
-- ARGV[4] category    integer
-- ARGV[5] quantity    integer
-- ARGV[6] ttl_ms      integer
-- ARGV[7] age_max_ms  integer the oldest snapshot that may decide
-- ARGV[8] held_max    integer tickets that a user may hold and have confirmed in the event; 0 = no limit
-- ARGV[9] interval_us integer between two tries at the steady rate; 0 = no limit
-- ARGV[10] burst      integer tries at once
-- ARGV[11] session    text    "" when none
-- ARGV[12] generation integer the user's presence generation
-- ARGV[13] repeatable text    "1" when KEYS[8] is a request's
--
-- RETURNS one of
--   {"granted", "deadline_ms available version now_ms"}
--   {"granted_before", "deadline_ms available version now_ms", lock}   this request's lock; nothing changed
--   {"request_ended", lock}          this request's lock has ended; nothing changed
--   {"request_mismatch"}             the request id was used for something else; nothing changed
--   {"stock_unknown"}                no snapshot young enough; nothing changed
--   {"rate_limited", retry_after_us} nothing changed
--   {"category_not_found"} {"closed"} {"already_locked", lock} {"limit_exceeded", held}
--   {"insufficient", available} {"sold_out"}   nothing changed but the rate
--
-- COST O(log n) in active locks of the event; granted: 5 reads, 8 writes, 1 publish.

expire_due()
local user, category, quantity = ARGV[3], ARGV[4], tonumber(ARGV[5])
local row = load(category)

if ARGV[13] == '1' then
  local seen = redis.call('GET', KEYS[8])
  if seen then
    local lock, seen_category, seen_quantity, version = string.match(seen, '^(%S+) (%d+) (%d+) (%d+)$')
    if seen_category ~= category or tonumber(seen_quantity) ~= quantity then return {'request_mismatch'} end
    local held = held_lock(user, category)
    if not row or not held or held.lock ~= lock or not held.active then return {'request_ended', lock} end
    -- A write, so that waiting for Redis replicas after a repeat waits for the grant too.
    keep(KEYS[1])
    return {'granted_before', int(held.deadline) .. ' ' .. int(available(row)) .. ' ' .. version .. ' ' .. now_text, lock}
  end
end

local stored = redis.call('HGET', KEYS[1], 'stored_ms')
if not stored or stored + ARGV[7] < now then return {'stock_unknown'} end

local interval, tried = tonumber(ARGV[9]), tonumber(now_us)
if interval > 0 then
  local arrival = math.max(tonumber(redis.call('GET', KEYS[9]) or 0), tried) + interval
  local ahead_max = interval * ARGV[10]
  local early = arrival - tried - ahead_max
  if early > 0 then return {'rate_limited', early} end
  -- For as long as it could limit anybody: a key that ends with each try is more work than one that is written anew.
  redis.call('SET', KEYS[9], int(arrival), 'PX', int(math.ceil(ahead_max / 1000)))
end

if not row then return {'category_not_found'} end
if row.open == '0' then return {'closed'} end
local text, sums, kept = unpack(redis.call('HMGET', KEYS[6], user .. ':' .. category, user, 'kept_ms'))
local held = text and held_lock(user, category)
if held and held.active then return {'already_locked', held.lock} end
local locks, tickets = sums_of(sums)
local held_max, free = tonumber(ARGV[8]), available(row)
if held_max == 0 then held_max = math.huge end
-- More may be due than one call ends; what has expired neither fills a user's limit nor the category.
while tickets + quantity > held_max and (expire_due() > 0 or catch_up()) or free < quantity and expire_due() > 0 do
  row = load(category)
  free = available(row)
  locks, tickets = sums_of(redis.call('HGET', KEYS[6], user))
end
if tickets + quantity > held_max then return {'limit_exceeded', tonumber(tickets)} end
if free < quantity then
  if free == 0 and row.active + row.settling == 0 then return {'sold_out'} end
  return {'insufficient', free}
end

local deadline = int(now + ARGV[6])
row.active = row.active + quantity
save(row, ' locked:' .. ARGV[5] .. ':' .. user)
write_lock(row, now_text, deadline, ARGV[12], 'attended', ARGV[11], locks, tickets, kept)
if ARGV[13] == '1' then
  redis.call('SET', KEYS[8], ARGV[2] .. ' ' .. category .. ' ' .. ARGV[5] .. ' ' .. row.version, 'PX',
    int(ARGV[6] + TOMBSTONE_MS))
end
return {'granted', deadline .. ' ' .. int(free - quantity) .. ' ' .. row.version .. ' ' .. now_text}
