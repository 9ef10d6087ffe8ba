-- lock: grant tickets of a category to a user until a deadline, or say why not.
--
-- KEYS[1] book        hash
-- KEYS[2] deadlines   zset
-- KEYS[3] ended       zset
-- KEYS[4] lock        string  the lock's facts, and how it ended if a caller ended it: see `FACTS`; TTL key
-- KEYS[5] rate        string  theoretical arrival time_us of the user's last try; TTL key
-- KEYS[6..] request   string  "lock category quantity version" of a request id; none where the request has none
-- ARGV[1] lock        text    the new lock's id
-- ARGV[2] user        integer
-- ARGV[3] category    integer
-- ARGV[4] quantity    integer
-- ARGV[5] session    text    "-" when none
-- ARGV[6] generation integer the user's presence generation
-- ARGV[7] limits     text    "ttl_ms age_max_ms held_max interval_us burst_us": the oldest snapshot that may decide; tickets
--                            that a user may hold and have confirmed in the event, 0 = no limit; between two tries at the
--                            steady rate, 0 = no limit; what the tries allowed at once take at that rate
-- ARGV[8] burst_ms   integer the last of them, rounded up
--
-- RETURNS one of the texts
--   "granted deadline_ms stock total open active settling version now_ms"
--   "granted_before deadline_ms stock total open active settling version now_ms lock"   this request's lock; nothing changed
--   "request_ended lock"             this request's lock has ended; nothing changed
--   "request_mismatch"               the request id was used for something else; nothing changed
--   "stock_unknown"                  no snapshot young enough; nothing changed
--   "rate_limited retry_after_us"    nothing changed
--   "category_not_found" "closed" "already_locked lock" "limit_exceeded held"
--   "insufficient available" "sold_out"        nothing changed but the rate
--
-- COST O(log n) in active locks of the event; granted: 2 reads, 4 writes, 1 publish.

local user, category, quantity, request = ARGV[2], ARGV[3], ARGV[4] + 0, KEYS[6]
local ttl, age_max, held_max, interval, burst = string.match(ARGV[7], '^(%d+) (%d+) (%d+) (%d+) (%d+)$')
local due, row, free, held, deadline, sums, tickets, is_full, stored
-- More may be due than one call ends; what has expired neither fills a user's limit nor the category.
repeat
  local counts, text
  due, counts, text, sums, stored = read(category, user .. ':' .. category, user .. ':', 'stored_ms')
  row, held, deadline = load(category, counts), active_of(text)
  free = row and row.open == '1' and math.max(0, row.stock - row.active - row.settling) or 0
  tickets = sums and string.match(sums, '%d+$') or 0
  is_full = held_max ~= '0' and tickets + quantity > held_max + 0
until not is_full and free >= quantity or expire_due() == 0 and (not is_full or expire_due(true) == 0)

if request then
  local seen = redis.call('GET', request)
  if seen then
    local lock, seen_category, seen_quantity, version = string.match(seen, '^(%S+) (%d+) (%d+) (%d+)$')
    if seen_category ~= category or tonumber(seen_quantity) ~= quantity then return 'request_mismatch' end
    if held ~= lock then return 'request_ended ' .. lock end
    -- A write, so that waiting for Redis replicas after a repeat waits for the grant too.
    redis.call('PEXPIRE', KEYS[1], KEEP_MS)
    local counts = {row.stock, row.total, row.open, row.active, row.settling, version, now_text}
    return 'granted_before ' .. deadline .. ' ' .. table.concat(counts, ' ') .. ' ' .. lock
  end
end

if not stored or stored + age_max < now then return 'stock_unknown' end

if interval ~= '0' then
  local tried, last = now_us, redis.call('GET', KEYS[5])
  local early = last and last + interval - now_us or 0
  if early > 0 then
    if early + interval > burst + 0 then return 'rate_limited ' .. early + interval - burst end
    tried = string.format('%d', last + interval)
  end
  -- For as long as it could limit anybody: a key that ends with each try is more work than one that is written anew.
  redis.call('SET', KEYS[5], tried, 'PX', ARGV[8])
end

if not row then return 'category_not_found' end
if row.open == '0' then return 'closed' end
if held then return 'already_locked ' .. held end
if is_full then return 'limit_exceeded ' .. tickets end
if free < quantity then
  if free == 0 and row.active + row.settling == 0 then return 'sold_out' end
  return 'insufficient ' .. free
end

deadline = now + ttl .. ''
local told = write_lock(KEYS[4], row, ' locked:' .. ARGV[4] .. ':' .. user, now_text, deadline, ARGV[6], 'attended', ARGV[5],
  due, sums)
if request then
  redis.call('SET', request, ARGV[1] .. ' ' .. category .. ' ' .. ARGV[4] .. ' ' .. row.version, 'PX',
    int(ttl + TOMBSTONE_MS))
end
return 'granted ' .. deadline .. ' ' .. told
