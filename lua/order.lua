-- order: count a completed or cancelled order.
--
-- A completed order marks the buyer's confirmed locks as sold with the next number: the first snapshot asked for after that
-- shows the sale and takes them out of `settling`. What no lock covers waits there under the order's own name. A
-- cancelled order's locks leave in the same way.
--
-- KEYS[1] book       hash
-- KEYS[2] deadlines  zset
-- KEYS[3] ended      zset
-- KEYS[4] settling   zset
-- KEYS[5] sold       zset
-- KEYS[6] order      string  "result category user matched unmatched"
-- ARGV[1] order      text
-- ARGV[2] category   integer
-- ARGV[3] quantity   integer
-- ARGV[4] user       integer
-- ARGV[5] lock       text    "" when the report names none
-- ARGV[6] result     text    "completed" or "cancelled"
-- ARGV[7] claim      text    "1": answer "confirm_first" where a lock should be confirmed by this order's word
--
-- RETURNS one of
--   {"noted"}                  counted; the stock should be asked for
--   {"repeated"}               told before (a lock that was confirmed since for this order is matched with it), or told
--                              before for another category or user, which changes nothing
--   {"after_cancel"}           completed after cancelled; a lock confirmed for it since leaves with the next snapshot
--   {"confirm_first", lock}    an active lock is this order's; nothing changed
--
-- COST O(log n + w) in active locks and the buyer's unreported confirmed locks; 5 reads, 3 + 4w writes, 1 publish.

expire_due()
local order, category, quantity, user = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local named, completed = ARGV[5], ARGV[6] == 'completed'
local record = redis.call('GET', KEYS[6])
local result, its_category, its_user, matched_before, unmatched_before =
  string.match(record or 'none 0 0 0 0', '^(%a+) (%d+) (%d+) (%d+) (%d+)$')
if record and (its_category ~= category or its_user ~= user) then return {'repeated'} end
local function remember(what, matched, unmatched)
  redis.call('SET', KEYS[6], table.concat({what, category, user, int(matched), int(unmatched)}, ' '), 'PX', CONFIRMED_MS)
end
if not completed and result == 'cancelled' then return {'repeated'} end

-- The buyer's confirmed locks that this report may be about, best first.
local fits, exact, oldest, covered = {}, nil, {}, 0
for _, waiting in ipairs(waiting_locks(user, category)) do
  if named ~= '' and waiting.lock == named or named == '' and waiting.order == order then
    fits[#fits + 1] = waiting
  elseif named == '' and waiting.order == '' then
    if not exact and waiting.quantity == quantity then exact = waiting end
    if covered < quantity then
      oldest[#oldest + 1] = waiting
      covered = covered + waiting.quantity
    end
  end
end
if #fits == 0 and not record and named == '' then fits = exact and {exact} or oldest end

if completed and result == 'cancelled' then
  for _, waiting in ipairs(fits) do mark(waiting.lock, category, waiting.quantity, user) end
  return {'after_cancel'}
end

if completed and not record and ARGV[7] == '1' then
  local held = held_lock(user, category)
  if held and held.active and (held.lock == named or named == '' and held.state == 'pinned' and #fits == 0) then
    return {'confirm_first', held.lock}
  end
end

if completed or not record then
  for _, waiting in ipairs(fits) do mark(waiting.lock, category, waiting.quantity, user) end
else
  fits = {}
end
local matched, row = 0, load(category)
for _, waiting in ipairs(fits) do matched = matched + waiting.quantity end

if not completed then
  hold(user, redis.call('HGET', KEYS[1], user .. ':'), 0, -(matched + matched_before))
  remember('cancelled', 0, 0)
  if row and (record or matched > 0) then save(row, ' cancelled:' .. ARGV[3] .. ':' .. user) end
  return {'noted'}
end

local entry = function(left) return member_of('o:' .. order, category, int(left), user) end
if not record then
  local unmatched = math.max(0, quantity - matched)
  remember('completed', matched, unmatched)
  if unmatched > 0 and row then
    mark_sold(entry(unmatched))
    row.settling = row.settling + unmatched
    save(row, '')
  end
  return {'noted'}
end

local moved = math.min(matched, tonumber(unmatched_before))
if matched > 0 then
  local left = unmatched_before - moved
  remember('completed', matched_before + matched, left)
  local number = redis.call('ZSCORE', KEYS[5], entry(unmatched_before))
  if number and row then
    redis.call('ZREM', KEYS[5], entry(unmatched_before))
    if left > 0 then redis.call('ZADD', KEYS[5], number, entry(left)) end
    row.settling = math.max(0, row.settling - moved)
    save(row, '')
  end
end
return {'repeated'}
