-- restore: write down again a lock that a replica remembers and that the ledger may have lost with its data.
--
-- KEYS[1] book        hash
-- KEYS[2] deadlines   zset
-- KEYS[3] ended       zset
-- KEYS[4] settling    zset
-- KEYS[5] lock        string
-- KEYS[6] request     string  KEYS[5] again when there is none
-- KEYS[7] order       string  what is remembered of the order that confirmed it; KEYS[5] again when there is none
-- ARGV[1] lock        text
-- ARGV[2] user        integer
-- ARGV[3] category    integer
-- ARGV[4] quantity    integer
-- ARGV[5] created_ms  integer this and the next are instants that the ledger itself once gave
-- ARGV[6] deadline_ms integer
-- ARGV[7] age_max_ms  integer the oldest snapshot that may decide
-- ARGV[8] session     text    "-" when none
-- ARGV[9] generation integer the user's presence generation
-- ARGV[10] state      text    "attended", "pinned" or "confirmed"
-- ARGV[11] order      text    the order that confirmed it, "" when not said
-- ARGV[12] settle_ms  integer a confirmed lock's order must be reported within this
-- ARGV[13] request    text    "1" when KEYS[6] is a request's
--
-- RETURNS one of
--   {"restored"}
--   {"restored_reported"}   a confirmed one whose order was reported: count it again, now that its lock is known
--   {"known"}               it is there, or how it ended is; nothing changed
--   {"expired"}             its deadline has passed; nothing changed
--   {"no_room"}             its tickets or its place are somebody else's by now; nothing changed
--   {"stock_unknown"}       no snapshot young enough; nothing changed
--
-- COST O(log n) in active locks of the event; restored: 3 reads, 4 writes, 1 publish.

expire_due()
local id, user, category, quantity, state = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[10]
local deadline = tonumber(ARGV[6])
if redis.call('EXISTS', KEYS[5]) == 1 then return {'known'} end
if state ~= 'confirmed' and deadline <= now then return {'expired'} end
local due, counts, text, sums, stored = read(category, user .. ':' .. category, user .. ':', 'stored_ms')
if not stored or now - stored > tonumber(ARGV[7]) then return {'stock_unknown'} end
local row = load(category, counts)
-- A closed category lets no new lock in, but keeps those that it had.
if not row or row.stock - row.active - row.settling < quantity then return {'no_room'} end

if state == 'confirmed' then
  row.settling = row.settling + quantity
  save(row, '')
  settle(id, category, quantity, user, ARGV[11], ARGV[12])
  hold(user, sums, 0, quantity)
  redis.call('HINCRBY', KEYS[1], '#confirmed', '1')
  local facts = {'confirmed', ARGV[6], '-', ARGV[11], user, category, ARGV[4], ARGV[5], row.version, ARGV[8]}
  redis.call('SET', KEYS[5], table.concat(facts, ' '), 'PX', CONFIRMED_MS)
  keep(KEYS[4])
  local reported = ARGV[11] ~= '' and redis.call('EXISTS', KEYS[7]) == 1
  return {reported and 'restored_reported' or 'restored'}
end

if active_of(text) then return {'no_room'} end
write_lock(KEYS[5], row, '', ARGV[5], ARGV[6], ARGV[9], state, ARGV[8], due, sums)
if ARGV[13] == '1' then
  redis.call('SET', KEYS[6], id .. ' ' .. category .. ' ' .. ARGV[4] .. ' ' .. row.version, 'PX',
    int(deadline - now + TOMBSTONE_MS))
end
return {'restored'}
