'use strict';
// Claim: when a lock's time is over everybody in the room learns that the tickets are back, its owner learns why they are
// gone, and from that instant nobody can buy with it.
// Provoked by: a short time to live, an owner with sockets on both replicas, a watcher, and both Nest callers.

const assert = require('node:assert/strict');
const check = require('../lib/check.js');
const { scenario } = require('../lib/scenario.js');

const EVENT = 1;
const GOLD = 1;
const TOTAL = 5;

/** One owner, who connects like this, locks tickets of one category and lets the time pass. */
async function letExpire({ a, b }, callers, transport, categoryId) {
  const user = 10 + categoryId;
  const owner = await a.connect(user, { name: 'owner', transport });
  const tab = await b.connect(user, { name: "owner's second tab", transport });
  const watcher = await b.connect(20 + categoryId, { name: 'watcher', transport });
  await watcher.join(EVENT);
  await owner.join(EVENT);
  const from = watcher.mark();
  const grant = await owner.lock(EVENT, categoryId, 3);
  check.granted(grant, { eventId: EVENT, categoryId, quantity: 3 });
  await watcher.update(categoryId, (u) => u.availableTickets === 2, { from });
  const locked = watcher.mark();

  const mine = (data) => data.categoryId === categoryId;
  const what = { lockId: grant.lockId, eventId: EVENT, categoryId, quantity: 3 };
  for (const socket of [owner, tab]) {
    const warning = await socket.next('lock-expiring', { within: 8000 });
    assert.equal(warning.lockId, grant.lockId);
    assert.equal(warning.expiresAt, grant.expiresAt);
    assert.ok(warning.remainingMs > 0 && warning.remainingMs <= 1500, JSON.stringify(warning));
    assert.deepEqual(await socket.next('lock-expired', { within: 8000 }), what);
    assert.equal(socket.all('lock-expiring').length, 1, 'warned once');
    assert.equal(socket.all('lock-expired').length, 1, 'told once');
  }
  const back = await watcher.next('tickets-released-by-other-user', { from: locked, where: mine });
  assert.deepEqual(back, { eventId: EVENT, categoryId, quantity: 3, reason: 'expired' });
  const up = await watcher.update(categoryId, (u) => u.availableTickets === TOTAL, { from: locked });
  check.availability(up, { lockedTickets: 0, totalTickets: TOTAL });
  const told = watcher.history.find((entry) => entry.data === up).at;
  const deadline = Date.parse(grant.expiresAt);
  assert.ok(told >= deadline - 5, `tickets were back ${deadline - told} ms too early`);
  assert.ok(told <= deadline + 2000, `the room learned it ${told - deadline} ms late`);
  check.ordered(watcher, categoryId);
  assert.deepEqual(owner.all('tickets-released-by-other-user', { where: mine }), [], 'the owner is not "another user"');
  assert.deepEqual(watcher.all('lock-expired'), []);

  for (const orders of callers) {
    const validated = await orders.send('validate-user-locks', { userId: user, eventId: EVENT, categoryId, quantity: 3 });
    assert.equal(validated.valid, false);
    assert.equal(validated.message, 'Ticket locks have expired. Please select tickets again.');
    assert.equal(await orders.send('confirm-ticket-lock', { lockId: grant.lockId }), false);
    assert.equal(await orders.send('confirm-lock', { lockId: grant.lockId, userId: user }), false);
    assert.equal(await orders.send('release-ticket-lock', { lockId: grant.lockId }), false);
    assert.deepEqual(await orders.send('get-user-locks', { userId: user }), []);
    check.lock(await orders.send('get-lock', { lockId: grant.lockId }), { status: 'expired' });
  }
  check.refused(await owner.ask('unlock-tickets', { lockId: grant.lockId }), 'lock_not_found', 'No tickets found to unlock');
  assert.deepEqual((await owner.ask('get-my-locks')).locks, []);
  check.granted(await watcher.lock(EVENT, categoryId, TOTAL), { eventId: EVENT, categoryId, quantity: TOTAL });
}

scenario('expiry: the owner is warned once and told, the room is told, the sale is refused', async (stage) => {
  const transports = ['default', 'websocket', 'polling'];
  await stage.events({ events: [{ id: EVENT, categories: transports.map((_, i) => ({ id: i + 1, total: TOTAL })) }] });
  const { a, b } = await stage.fleet({ SEATLOCK_LOCK_TTL: '3s', SEATLOCK_EXPIRY_WARNING: '1500ms' });
  const callers = await Promise.all([stage.orders(11), stage.orders(10)]);
  const on = (replica) => ({ connect: (user, options) => stage.client(replica, user, options) });
  await Promise.all(transports.map((transport, i) => letExpire({ a: on(a), b: on(b) }, callers, transport, i + 1)));
});

scenario('expiry: an order in progress is not ended by a disconnect nor by the old deadline', async (stage) => {
  await stage.events({ events: [{ id: EVENT, categories: [{ id: GOLD, total: TOTAL }] }] });
  const { a, b } = await stage.fleet({
    SEATLOCK_LOCK_TTL: '3s', SEATLOCK_CHECKOUT_WINDOW: '15s', SEATLOCK_DISCONNECT_GRACE: '1s', SEATLOCK_EXPIRY_WARNING: '1s',
  });
  const orders = await stage.orders(11);
  const watcher = await stage.client(b, 8, { name: 'watcher' });
  await watcher.join(EVENT);
  const pinned = await stage.client(a, 21, { name: 'in checkout' });
  const idle = await stage.client(a, 22, { name: 'idle' });
  const late = await stage.client(a, 23, { name: 'still there' });
  const mine = await pinned.lock(EVENT, GOLD, 1);
  const theirs = await idle.lock(EVENT, GOLD, 2);
  const last = await late.lock(EVENT, GOLD, 1);
  for (const one of [mine, theirs, last]) assert.equal(one.success, true, JSON.stringify(one));
  const validated = await orders.send('validate-user-locks', { userId: 21, eventId: EVENT, categoryId: GOLD, quantity: 1 });
  assert.equal(validated.valid, true);
  assert.equal(validated.lockId, mine.lockId);
  const lives = Date.parse(validated.expiresAt) - Date.now();
  assert.ok(lives > 13_000 && lives <= 15_500, `the pin gives ${lives} ms`);
  pinned.close();
  idle.close();

  const abandoned = await watcher.next('tickets-released-by-other-user', { where: ({ quantity }) => quantity === 2, within: 8000 });
  assert.equal(abandoned.reason, 'abandoned');
  await late.next('lock-expired', { within: 8000 });
  check.lock(await orders.send('get-lock', { lockId: mine.lockId }), { status: 'active' });
  assert.equal(await orders.send('confirm-ticket-lock', { lockId: mine.lockId, orderId: 77 }), true);
  assert.equal(await orders.send('confirm-ticket-lock', { lockId: theirs.lockId }), false);
});
