-- locks: a user's active locks in the event.
--
-- KEYS[1] book       hash
-- KEYS[2] deadlines  zset
-- KEYS[3] ended      zset
-- ARGV[1] user       integer
--
-- RETURNS
--   {"locks", {lock, category, quantity, created_ms, deadline_ms, state}, ...}   by category as the events-service lists them
--
-- COST O(c) in categories of the event; 1 + c reads.

local reply = {'locks'}
for category in string.gmatch(redis.call('HGET', KEYS[1], 'categories') or '', '%S+') do
  local held = held_lock(ARGV[1], category)
  if held and held.active then
    reply[#reply + 1] = {held.lock, category, int(held.quantity), held.created, int(held.deadline), held.state}
  end
end
return reply
