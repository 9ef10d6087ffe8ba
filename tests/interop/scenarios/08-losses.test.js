'use strict';
// Claim: no lock is lost with a part of the system. Redis comes back empty: buyers with an open socket keep their locks
// as far as the stock allows, and who cannot is told. A replica dies or hangs: its buyers find their locks at another one,
// and the tickets of those who do not come back are free after the lease and the grace.
// Provoked by: SIGKILL of Redis and an empty start; SIGKILL of a replica; SIGSTOP of a replica for longer than its lease.

const assert = require('node:assert/strict');
const check = require('../lib/check.js');
const { scenario } = require('../lib/scenario.js');
const { until } = require('../lib/wait.js');

const EVENT = 1;
const GOLD = 1;
const SILVER = 2;
const LEASE_MS = 5000;

const mine = async (client) => (await client.ask('get-my-locks')).locks;

scenario('redis comes back empty: buyers keep their locks, and who cannot is told', async (stage) => {
  await stage.events({ events: [{ id: EVENT, categories: [{ id: GOLD, total: 10 }, { id: SILVER, total: 5 }] }] });
  const { a, b } = await stage.fleet({ SEATLOCK_SETTLE_TIMEOUT: '30s' });
  const orders = await stage.orders(11);
  const [first, second, third, fourth, watcher] = await Promise.all([
    stage.client(a, 1, { name: 'first' }),
    stage.client(b, 2, { name: 'second', transport: 'websocket' }),
    stage.client(a, 3, { name: 'third' }),
    stage.client(b, 4, { name: 'fourth' }),
    stage.client(b, 5, { name: 'watcher' }),
  ]);
  await watcher.join(EVENT);
  const grants = [
    await first.lock(EVENT, GOLD, 3, { requestId: 'mine' }),
    await second.lock(EVENT, GOLD, 3),
    await third.lock(EVENT, SILVER, 5),
    await fourth.lock(EVENT, GOLD, 2),
  ];
  const validated = await orders.send('validate-user-locks', { userId: 2, eventId: EVENT, categoryId: GOLD, quantity: 3 });
  assert.equal(validated.lockId, grants[1].lockId);
  assert.equal(await orders.send('confirm-lock', { lockId: grants[3].lockId, userId: 4, orderId: 44 }), true);
  const versions = Math.max(...watcher.all('availability-update').map(({ version }) => version));
  const before = await Promise.all(grants.map(({ lockId }) => orders.send('get-lock', { lockId })));

  await stage.store.kill();
  // Meanwhile somebody else sells the third buyer's tickets.
  await stage.stock.call('sell', { eventId: EVENT, categoryId: SILVER, quantity: 3 });
  await until(15_000, 'readiness goes down', async () => (await b.http('/readyz')).status === 503, 100);
  const from = watcher.mark();
  await stage.store.restart();
  const back = Date.now();
  // From the first moment on somebody tries to snatch what is not free.
  const thief = await stage.client(a, 9, { name: 'thief', transport: 'websocket' });
  const snatched = until(10_000, 'new locks are decided again', async () => {
    const answer = await thief.lock(EVENT, GOLD, 3, { requestId: 'snatch' });
    return answer.code === 'unavailable' ? undefined : answer;
  }, 50);

  const told = await third.next('lock-expired', { within: 12_000 });
  assert.deepEqual(told, { lockId: grants[2].lockId, eventId: EVENT, categoryId: SILVER, quantity: 5 });
  for (const [i, client] of [first, second].entries()) {
    const locks = await until(5000, `${client.name} has its lock back`, async () => {
      const all = await mine(client);
      return all.length === 1 ? all : undefined;
    }, 100);
    assert.equal(locks[0].lockId, grants[i].lockId);
    const record = await orders.send('get-lock', { lockId: grants[i].lockId });
    assert.equal(record.expiresAt, before[i].expiresAt);
    assert.ok(record.version > before[i].version, 'a new and higher fencing token');
  }
  assert.ok(Date.now() - back < 15_000, `restored ${Date.now() - back} ms after Redis was back`);
  assert.deepEqual(await mine(third), []);
  assert.ok([first, second, third, fourth].every(({ socket }) => socket.connected), 'sockets stayed');
  check.refused(await snatched, 'insufficient_tickets');
  await stage.agree(EVENT, GOLD, { availableTickets: 2, lockedTickets: 8 });
  await stage.agree(EVENT, SILVER, { availableTickets: 2, lockedTickets: 0 });
  const news = await watcher.update(GOLD, (u) => u.lockedTickets === 8, { from, within: 8000 });
  assert.ok(news.version > versions, `version ${news.version} after ${versions}`);
  check.ordered(watcher, GOLD);

  // The locks are what they were: the same request has the same answer, the pin holds, the sale is still to be settled.
  assert.equal((await first.lock(EVENT, GOLD, 3, { requestId: 'mine' })).lockId, grants[0].lockId);
  assert.equal(await orders.send('confirm-lock', { lockId: grants[1].lockId, userId: 2 }), true);
  assert.equal(await orders.send('confirm-lock', { lockId: grants[3].lockId, userId: 4, orderId: 44 }), true, 'a repeat');
  assert.equal(await orders.send('confirm-lock', { lockId: grants[3].lockId, userId: 4, orderId: 45 }), false, 'another order');
  assert.equal((await first.ask('unlock-tickets', { lockId: grants[0].lockId })).success, true);
  await stage.agree(EVENT, GOLD, { availableTickets: 5, lockedTickets: 5 });
}, { timeout: 75_000 });

scenario('redis goes on from an older copy: later locks and sales are not lost, versions go on rising', async (stage) => {
  await stage.events({ events: [{ id: EVENT, categories: [{ id: GOLD, total: 10 }] }] });
  const { a, b } = await stage.fleet();
  const orders = await stage.orders(11);
  const [sold, late, watcher] = await Promise.all([
    stage.client(a, 1, { name: 'buyer' }), stage.client(b, 2, { name: 'late buyer' }), stage.client(b, 5, { name: 'watcher' }),
  ]);
  await watcher.join(EVENT);
  const bought = await sold.lock(EVENT, GOLD, 3);
  await stage.store.save();
  assert.equal(await orders.send('confirm-lock', { lockId: bought.lockId, userId: 1, orderId: 11 }), true);
  const held = await late.lock(EVENT, GOLD, 4);
  await watcher.update(GOLD, (u) => u.lockedTickets === 7);
  await stage.store.kill();
  await until(15_000, 'readiness goes down', async () => (await b.http('/readyz')).status === 503, 100);
  const from = watcher.mark();
  await stage.store.restart();
  await stage.agree(EVENT, GOLD, { availableTickets: 3, lockedTickets: 7 });
  assert.deepEqual((await mine(late)).map(({ lockId }) => lockId), [held.lockId]);
  await until(5000, 'the sale is a sale again', async () => {
    const record = await orders.send('get-lock', { lockId: bought.lockId });
    return record.status === 'confirmed';
  }, 100);
  await watcher.update(GOLD, (u) => u.lockedTickets === 7, { from, what: 'news of the restored counts' });
  check.ordered(watcher, GOLD);
}, { timeout: 60_000 });

scenario('a replica dies, another hangs: buyers find their locks, tickets of those who stay away come back', async (stage) => {
  await stage.events({ events: [{ id: EVENT, categories: [{ id: GOLD, total: 10 }] }] });
  const grace = 10_000;
  const { a, b } = await stage.fleet({ SEATLOCK_DISCONNECT_GRACE: `${grace}ms` });
  const orders = await stage.orders(10);
  const watcher = await stage.client(b, 5, { name: 'watcher', transport: 'websocket' });
  await watcher.join(EVENT);
  const [comes, stays, tabs] = await Promise.all(
    [1, 2, 3].map((user) => stage.client(a, user, { name: `buyer ${user}` })),
  );
  const grants = await Promise.all([comes, stays, tabs].map((client) => client.lock(EVENT, GOLD, 2)));
  const phone = await stage.client(b, 3, { name: 'telephone of buyer 3' });
  await watcher.update(GOLD, (u) => u.availableTickets === 4);

  const from = watcher.mark();
  await a.process.kill();
  const died = Date.now();
  const again = await stage.client(b, 1, { name: 'buyer 1, again' });
  assert.deepEqual(again.greeting.locks.map(({ lockId }) => lockId), [grants[0].lockId]);
  await watcher.update(GOLD, (u) => u.availableTickets === 6, { from, within: LEASE_MS + grace + 9000, what: 'two tickets back' });
  const late = Date.now() - died;
  assert.ok(late >= grace, `the tickets were back after ${late} ms`);
  await watcher.next('tickets-released-by-other-user');
  const moved = watcher.all('tickets-released-by-other-user');
  assert.deepEqual(moved.map(({ quantity, reason }) => ({ quantity, reason })), [{ quantity: 2, reason: 'abandoned' }]);
  for (const [client, grant] of [[again, grants[0]], [phone, grants[2]]]) {
    const [lock] = await mine(client);
    assert.equal(lock.lockId, grant.lockId, client.name);
    assert.ok(Date.parse(lock.expiresAt) - Date.now() > 20_000, `as if nothing had been: ${lock.expiresAt}`);
  }

  // The dead one starts again, the other hangs for longer than its lease: its sessions are ended, and enter again.
  await a.start();
  const witness = await stage.client(a, 6, { name: 'witness' });
  b.process.signal('SIGSTOP');
  await until(LEASE_MS + 8000, 'the locks of the hanging replica are in their grace', async () => {
    const [lock] = await orders.send('get-user-locks', { userId: 3 });
    return Date.parse(lock.expiresAt) - Date.now() < grace;
  }, 500);
  b.process.signal('SIGCONT');
  await until(8000, 'the grace is taken back', async () => {
    const [lock] = await mine(phone);
    assert.equal(lock?.lockId, grants[2].lockId);
    return Date.parse(lock.expiresAt) - Date.now() > grace;
  }, 200);
  assert.ok(again.socket.connected && phone.socket.connected, 'sockets stayed');
  assert.equal((await witness.ask('heartbeat')).timestamp.length, 24);
}, { timeout: 90_000 });
