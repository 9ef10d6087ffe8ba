'use strict';
// Claim: the box office of examples/ is a complete neighbour. Both flows end in a sale or in nothing, and its database and
// Seatlock agree.
// Provoked by: buyers at the HTTP gateway, repeats, failing payments, cancellations, orders without a good lock.

const assert = require('node:assert/strict');
const { randomUUID } = require('node:crypto');
const check = require('../lib/check.js');
const { scenario } = require('../lib/scenario.js');
const { until } = require('../lib/wait.js');

const EVENT = 1;
const DECK = 2;

/** What the events-service calls unsold. */
const unsold = (office, category) =>
  office.count(`select total_seats - reserved_seats from events.category where id = ${category}`);

const FLOWS = [
  ['create-order', '/api/orders', (grant) => ({ eventId: EVENT, categoryId: DECK, quantity: grant.quantity })],
  ['create-order-with-lock', '/api/orders/with-lock',
    (grant) => ({ eventId: EVENT, categoryId: DECK, quantity: grant.quantity, lockId: grant.lockId })],
];

for (const [flow, page, body] of FLOWS) {
  scenario(`box office: ${flow} is paid, sold and told; cancelling gives everything back`, async (stage) => {
    const office = await stage.boxOffice();
    const { a, b } = await stage.fleet();
    const before = unsold(office, DECK);
    const buyer = await stage.client(a, 101, { name: 'buyer' });
    const watcher = await stage.client(b, 901, { name: 'watcher' });
    await watcher.join(EVENT);
    const grant = await buyer.lock(EVENT, DECK, 2);
    check.granted(grant, { eventId: EVENT, categoryId: DECK, quantity: 2 });

    const key = randomUUID();
    const from = watcher.mark();
    const placed = await office.post(page, 101, body(grant), key);
    assert.equal(placed.status, 200, JSON.stringify(placed));
    assert.equal(placed.body.lockId, grant.lockId);
    const again = await office.post(page, 101, body(grant), key);
    assert.equal(again.body.orderId, placed.body.orderId, 'the same key is the same order');
    const second = await office.post(page, 101, body(grant));
    assert.equal(second.status, 409, 'a lock is good for one order');

    const { orderId } = placed.body;
    const order = await office.settled(101, orderId);
    assert.equal(order.status, 'completed');
    const told = await buyer.next('order-completed', { where: (data) => data.orderId === orderId });
    assert.deepEqual([told.eventId, told.categoryId, told.quantity], [EVENT, DECK, 2]);
    await stage.agree(EVENT, DECK, { availableTickets: before - 2, lockedTickets: 0 });
    assert.equal(unsold(office, DECK), before - 2);
    const seen = watcher.all('availability-update', { from, where: (data) => data.categoryId === DECK });
    assert.ok(seen.every((update) => update.availableTickets <= before - 2), `sold tickets came back: ${JSON.stringify(seen)}`);
    assert.equal(office.query(`select outcome from payments.payment where order_id = ${orderId}`), 'paid');

    const foreign = await office.post(`/api/orders/${orderId}/cancel`, 102);
    assert.deepEqual([foreign.status, foreign.body.code], [404, 'order_not_found'], "another's order is none");
    const cancelled = await office.post(`/api/orders/${orderId}/cancel`, 101);
    assert.equal(cancelled.body.status, 'cancelled');
    await office.settled(101, orderId);
    await buyer.next('order-cancelled', { where: (data) => data.orderId === orderId });
    await stage.agree(EVENT, DECK, { availableTickets: before, lockedTickets: 0 });
    assert.equal(unsold(office, DECK), before);
    assert.equal(office.query(`select outcome from payments.payment where order_id = ${orderId}`), 'refunded');
    const list = (await office.get('/api/orders', 101)).body;
    assert.ok(list.some((one) => one.orderId === orderId) && list.every((one) => one.userId === 101 && one.status === 'cancelled'));
  });

  for (const [how, env, code] of [
    ['declined', { BOX_OFFICE_PAYMENT_FAILS: '1' }, 'payment_declined'],
    ['abandoned', { BOX_OFFICE_PAYMENT_ABANDONS: '1', BOX_OFFICE_PAYMENT_WINDOW: '1s' }, 'payment_abandoned'],
  ]) {
    scenario(`box office: ${flow} whose payment is ${how} releases the lock and sells nothing`, async (stage) => {
      const office = await stage.boxOffice(env);
      const { a } = await stage.fleet();
      const before = unsold(office, DECK);
      const buyer = await stage.client(a, 101, { name: 'buyer' });
      const grant = await buyer.lock(EVENT, DECK, 3);
      const placed = await office.post(page, 101, body(grant));
      assert.equal(placed.status, 200, JSON.stringify(placed));
      const order = await office.settled(101, placed.body.orderId);
      assert.deepEqual([order.status, order.code], ['cancelled', code]);
      await buyer.next('order-cancelled', { where: (data) => data.orderId === order.orderId });
      await buyer.next('lock-released', { where: (data) => data.lockId === grant.lockId });
      await stage.agree(EVENT, DECK, { availableTickets: before, lockedTickets: 0 });
      assert.equal(unsold(office, DECK), before);
      assert.equal(office.count(`select count(*) from payments.payment where outcome = 'paid'`), 0);
    });
  }
}

scenario('box office: orders without a good lock are refused, and nothing is left of them', async (stage) => {
  const office = await stage.boxOffice();
  const { a } = await stage.fleet();
  const before = unsold(office, DECK);
  const buyer = await stage.client(a, 101, { name: 'buyer' });
  const grant = await buyer.lock(EVENT, DECK, 2);
  const want = { eventId: EVENT, categoryId: DECK, quantity: 2 };
  for (const [user, page, body, status, code] of [
    [undefined, '/api/orders', want, 401, 'unauthorized'],
    [102, '/api/orders', want, 409, 'lock_not_found'],
    [101, '/api/orders', { ...want, quantity: 3 }, 409, 'lock_not_found'],
    [101, '/api/orders', { ...want, quantity: 0 }, 400, 'invalid_request'],
    [101, '/api/orders', { eventId: EVENT }, 400, 'invalid_request'],
    [102, '/api/orders/with-lock', { ...want, lockId: grant.lockId }, 409, 'lock_not_found'],
    [101, '/api/orders/with-lock', { ...want, quantity: 1, lockId: grant.lockId }, 409, 'lock_not_found'],
    [101, '/api/orders/with-lock', want, 400, 'invalid_request'],
  ]) {
    const answer = await office.post(page, user, body);
    assert.deepEqual([answer.status, answer.body.status, answer.body.code], [status, status, code], JSON.stringify([user, page, body, answer]));
    assert.equal(typeof answer.body.message, 'string');
  }
  assert.equal((await office.get('/api/events/4711')).body.code, 'event_not_found');
  assert.equal((await office.get('/api/orders/x', 101)).body.code, 'invalid_request');
  assert.equal((await office.get('/nothing')).body.code, 'not_found');
  const lock = (await buyer.ask('get-my-locks')).locks[0];
  assert.equal(lock?.lockId, grant.lockId, 'a refused order does not take the lock with it');
  await until(10_000, 'nothing is open', () => office.count(`select count(*) from orders.purchase where step not in ('completed', 'cancelled')`) === 0);
  assert.equal(unsold(office, DECK), before);
});
