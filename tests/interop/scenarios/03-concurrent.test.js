'use strict';
// Claim: of eight buyers who want one of five tickets at the same moment, on two replicas, exactly five get one.
// Provoked by: real clients that all ask at once; then the sale of all five, or owners who walk away.

const assert = require('node:assert/strict');
const check = require('../lib/check.js');
const { scenario } = require('../lib/scenario.js');
const { until } = require('../lib/wait.js');

const EVENT = 1;
const GOLD = 1;
const TOTAL = 5;
const BUYERS = 8;

/** Eight buyers, half on each replica, both ways to connect; all ask at once. */
async function rush(stage) {
  const { a, b } = stage.seatlock;
  const watchers = [
    await stage.client(a, 901, { name: 'watcher' }),
    await stage.client(b, 902, { name: 'watcher', transport: 'websocket' }),
  ];
  for (const watcher of watchers) await watcher.join(EVENT);
  const buyers = await Promise.all(Array.from({ length: BUYERS }, (_, i) =>
    stage.client(i % 2 ? a : b, 100 + i, { name: 'buyer', transport: i % 4 < 2 ? 'default' : 'websocket' })));
  await Promise.all(buyers.map((buyer) => buyer.join(EVENT)));
  const answers = await Promise.all(buyers.map((buyer) => buyer.lock(EVENT, GOLD, 1)));
  const winners = [];
  const losers = [];
  answers.forEach((answer, i) => {
    if (answer.success) {
      check.granted(answer, { eventId: EVENT, categoryId: GOLD, quantity: 1 });
      winners.push({ buyer: buyers[i], lockId: answer.lockId });
    } else {
      check.refused(answer, 'insufficient_tickets', 'Only 0 tickets available');
      assert.equal(answer.availableTickets, 0);
      losers.push(buyers[i]);
    }
  });
  assert.equal(winners.length, TOTAL, `${winners.length} of ${BUYERS} won ${TOTAL} tickets`);
  assert.equal(new Set(winners.map(({ lockId }) => lockId)).size, TOTAL);
  for (const watcher of watchers) {
    const full = await watcher.update(GOLD, (u) => u.status === 'temporarily-unavailable');
    check.availability(full, { availableTickets: 0, lockedTickets: TOTAL, totalTickets: TOTAL });
    // Locks of one tick may be summed, but none is missing and none is told twice.
    await until(3000, `${watcher.name} heard of ${TOTAL} locked tickets`, () => sum(watcher, 'tickets-locked-by-other-user') === TOTAL);
  }
  return { losers, watchers, winners };
}

function sum(client, name, where) {
  return client.all(name, { where }).reduce((total, { quantity }) => total + quantity, 0);
}

scenario('concurrent buyers: five of eight win, and after the sale it is sold out', async (stage) => {
  await stage.events({ events: [{ id: EVENT, categories: [{ id: GOLD, total: TOTAL }] }] });
  await stage.fleet();
  const callers = [await stage.orders(11), await stage.orders(10)];
  const { losers, watchers, winners } = await rush(stage);
  const from = watchers.map((watcher) => watcher.mark());
  await Promise.all(winners.map(({ buyer, lockId }, i) => {
    const flow = i % 3 ? 'create-order' : 'create-order-with-lock';
    return callers[i % 2].call(flow, {
      orderId: 7000 + i, userId: buyer.user, eventId: EVENT, categoryId: GOLD, quantity: 1, lockId,
    });
  }));
  await Promise.all(winners.map(({ buyer }, i) =>
    buyer.next('order-completed', { where: ({ orderId }) => orderId === 7000 + i })));
  for (const [i, watcher] of watchers.entries()) {
    const over = await watcher.update(GOLD, (u) => u.status === 'sold-out', { from: from[i], within: 8000 });
    check.availability(over, { availableTickets: 0, lockedTickets: 0, totalTickets: TOTAL });
    const flicker = watcher.all('availability-update', { from: from[i], where: (u) => u.availableTickets > 0 });
    assert.deepEqual(flicker, [], 'sold tickets came back for a moment');
    check.ordered(watcher, GOLD);
  }
  await stage.agree(EVENT, GOLD, { availableTickets: 0, lockedTickets: 0, totalTickets: TOTAL, status: 'sold-out' });
  for (const loser of losers) check.refused(await loser.lock(EVENT, GOLD, 1), 'sold_out');
  assert.equal((await stage.stock.call('read', { eventId: EVENT }))[0].availableSeats, 0);
});

scenario('concurrent buyers: who walks away gives his tickets back after the grace, who comes back keeps them', async (stage) => {
  await stage.events({ events: [{ id: EVENT, categories: [{ id: GOLD, total: TOTAL }] }] });
  const { a, b } = await stage.fleet({ SEATLOCK_DISCONNECT_GRACE: '2s' });
  const { losers, watchers, winners } = await rush(stage);
  const from = watchers.map((watcher) => watcher.mark());
  const [gone, gone2, returning, steady] = winners;
  for (const { buyer } of [gone, gone2, returning]) buyer.close();
  const elsewhere = returning.buyer.name.endsWith('A') ? b : a;
  const again = await stage.client(elsewhere, returning.buyer.user, { name: 'returned buyer' });
  assert.deepEqual(again.greeting.locks.map(({ lockId }) => lockId), [returning.lockId]);
  check.lock(again.greeting.locks[0], { status: 'active', userId: returning.buyer.user, quantity: 1 });

  for (const [i, watcher] of watchers.entries()) {
    const back = (data) => data.reason === 'abandoned';
    await watcher.update(GOLD, (u) => u.availableTickets === 2, { from: from[i], within: 8000, what: 'two tickets back' });
    await until(3000, `${watcher.name} heard of 2 abandoned tickets`, () => sum(watcher, 'tickets-released-by-other-user', back) === 2);
    check.ordered(watcher, GOLD);
  }
  await stage.agree(EVENT, GOLD, { availableTickets: 2, lockedTickets: 3, status: 'available' });
  const mine = (await again.ask('get-my-locks')).locks;
  assert.deepEqual(mine.map(({ lockId }) => lockId), [returning.lockId]);
  assert.equal((await steady.buyer.ask('get-my-locks')).locks.length, 1);
  assert.ok(Date.parse(mine[0].expiresAt) - Date.now() > 20_000, `the grace was taken back: ${JSON.stringify(mine[0])}`);

  check.granted(await losers[0].lock(EVENT, GOLD, 1), { eventId: EVENT, categoryId: GOLD, quantity: 1 });
  check.granted(await losers[1].lock(EVENT, GOLD, 1), { eventId: EVENT, categoryId: GOLD, quantity: 1 });
  check.refused(await losers[2].lock(EVENT, GOLD, 1), 'insufficient_tickets');
});
