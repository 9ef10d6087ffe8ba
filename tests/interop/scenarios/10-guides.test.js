'use strict';
// Claim: who reads only docs/ has a working orders-service and a working front end.
// Provoked by: the code of the guides, taken out of the pages as it stands there, on NestJS 11 and 10 and on the real
// socket.io-client, through sales, refusals, an outage of Redis in the middle of an order, and a reconnect.

const assert = require('node:assert/strict');
const { io } = require('socket.io-client');
const check = require('../lib/check.js');
const { block, run } = require('../lib/guide.js');
const { Peer } = require('../lib/peer.js');
const { scenario } = require('../lib/scenario.js');
const { Sticky } = require('../lib/sticky.js');
const { token } = require('../lib/token.js');
const { until, within } = require('../lib/wait.js');

const EVENT = 1;
const DECK = 2;

for (const major of [11, 10]) {
  scenario(`guides: the orders-service of the guide on Nest ${major} sells, refuses and survives an outage`, async (stage) => {
    const office = await stage.boxOffice();
    // The box office's events-service takes part; its orders-service does not.
    await office.processes.get('orders').stop();
    const { a, b } = await stage.fleet({ SEATLOCK_STOCK_REFRESH: '1s' });
    const orders = await Peer.start('guide-orders-service', major, { amqp: stage.amqp, queue: stage.queue, events: office.queues.events });
    stage.peers.push(orders);
    const unsold = () => office.count(`select total_seats - reserved_seats from events.category where id = ${DECK}`);
    const before = unsold();
    const buyer = await stage.client(a, 7, { name: 'buyer' });
    const watcher = await stage.client(b, 9, { name: 'watcher' });
    await watcher.join(EVENT);
    const locked = async (quantity) => {
      const grant = await buyer.lock(EVENT, DECK, quantity);
      check.granted(grant, { eventId: EVENT, categoryId: DECK, quantity });
      return grant.lockId;
    };
    const want = (orderId, quantity) => ({ orderId, userId: 7, eventId: EVENT, categoryId: DECK, quantity });

    // Both flows.
    let lockId = await locked(2);
    assert.equal((await orders.call('create-order', want(1, 2))).lockId, lockId);
    await buyer.next('order-completed', { where: ({ orderId }) => orderId === 1 });
    lockId = await locked(3);
    assert.deepEqual(await orders.call('create-order-with-lock', { orderId: 2, userId: 7, lockId }), { ...want(2, 3), lockId });
    await buyer.next('order-completed', { where: ({ orderId }) => orderId === 2 });
    await stage.agree(EVENT, DECK, { availableTickets: before - 5, lockedTickets: 0 });
    assert.equal(unsold(), before - 5);

    // Refusals.
    const nothing = await check.failure(orders.call('create-order', want(3, 1)));
    assert.deepEqual(nothing, { message: 'No valid locks found for the requested tickets', code: 'lock_not_found' });
    lockId = await locked(2);
    const stolen = await check.failure(orders.call('create-order-with-lock', { orderId: 4, userId: 8, lockId }));
    assert.equal(stolen.code, 'lock_not_found', "another's lock");
    await buyer.ask('unlock-tickets', { lockId });
    const sell = (open) => office.query(`update events.category set is_active = ${open} where id = ${DECK}`);
    const lockedSoon = (quantity) => until(15_000, 'a lock', async () => {
      const grant = await buyer.lock(EVENT, DECK, quantity);
      if (!grant.success) throw new Error(JSON.stringify(grant));
      return grant.lockId;
    }, 250);
    for (const [orderId, flow] of [[5, 'create-order'], [6, 'create-order-with-lock']]) {
      lockId = await lockedSoon(2);
      sell(false);
      const refused = await check.failure(orders.call(flow, { ...want(orderId, 2), lockId }));
      sell(true);
      assert.deepEqual([refused.statusCode, refused.code], [409, 'sold_out'], `${flow}: ${JSON.stringify(refused)}`);
      await buyer.next('order-cancelled', { where: (order) => order.orderId === orderId });
      await buyer.next('lock-released', { where: (gone) => gone.lockId === lockId });
    }
    assert.equal(unsold(), before - 5);

    // An answer that does not come is unknown, and is asked for again.
    lockId = await lockedSoon(1);
    stage.store.freeze();
    const during = orders.call('create-order', want(7, 1), 20_000);
    await until(10_000, 'an attempt went unanswered', async () => (await a.http('/metrics')).text.match(/seatlock_rpc_messages_total\{[^}]*failed[^}]*\} [1-9]/)
      || (await b.http('/metrics')).text.match(/seatlock_rpc_messages_total\{[^}]*failed[^}]*\} [1-9]/), 100);
    stage.store.thaw();
    assert.equal((await during).lockId, lockId);
    await stage.agree(EVENT, DECK, { availableTickets: before - 6, lockedTickets: 0 }, 20_000);
    assert.equal(unsold(), before - 6);
  });
}

scenario('guides: the front end of the guide locks, counts down on the server\'s clock, and finds its locks again', async (stage) => {
  await stage.events({ events: [{ id: EVENT, categories: [{ id: DECK, total: 10 }] }] });
  const { a } = await stage.fleet();
  const { connect } = run(block('integration-frontend.md', 'connect'), { io, crypto: globalThis.crypto });
  let given = 0;
  const buyer = connect(a.url, async () => { given += 1; return token(7); }, { forceNew: true, reconnectionDelay: 100, reconnectionDelayMax: 300 });
  try {
    const connected = () => new Promise((resolve) => buyer.socket.once('connected', resolve));
    await within(10_000, 'connected', connected());
    const joined = await buyer.join(EVENT);
    assert.equal(joined.availability[0].availableTickets, 10);
    const grant = await buyer.lock(EVENT, DECK, 4);
    assert.equal(grant.success, true, JSON.stringify(grant));
    const left = buyer.left(grant);
    assert.ok(left > 50_000 && left <= 60_000, `${left} ms of 60 s`);
    assert.equal((await buyer.lock(EVENT, DECK, 1)).code, 'already_locked');

    const again = connected();
    buyer.socket.io.engine.close();
    const greeting = await within(10_000, 'connected again', again);
    assert.deepEqual(greeting.locks.map((lock) => lock.lockId), [grant.lockId]);
    assert.ok(given >= 2, 'a fresh token for each connection');

    // Unknown is not no: the same request is sent again until Redis is back.
    stage.store.freeze();
    const unlocking = buyer.unlock(grant.lockId);
    const first = await Promise.race([unlocking.then(() => 'answered'), new Promise((resolve) => setTimeout(resolve, 1000, 'waiting'))]);
    assert.equal(first, 'waiting');
    stage.store.thaw();
    const unlocked = await unlocking;
    assert.ok(unlocked.success || unlocked.code === 'lock_not_found', JSON.stringify(unlocked));
    await stage.agree(EVENT, DECK, { availableTickets: 10, lockedTickets: 0 });
  } finally {
    buyer.socket.disconnect();
  }
});

scenario('guides: the front end of the guide polls by way of a load balancer, because it keeps its cookie', async (stage) => {
  await stage.events({ events: [{ id: EVENT, categories: [{ id: DECK, total: 10 }] }] });
  const { replicas } = await stage.fleet();
  const sticky = await Sticky.start(replicas);
  const { connect } = run(block('integration-frontend.md', 'connect'), { io, crypto: globalThis.crypto });
  const open = (user, options) => connect(sticky.url, async () => token(user), { forceNew: true, transports: ['polling'], reconnection: false, ...options });
  const buyer = open(7);
  let careless;
  try {
    await within(10_000, 'connected', new Promise((resolve) => buyer.socket.once('connected', resolve)));
    await buyer.join(EVENT);
    const grant = await buyer.lock(EVENT, DECK, 2);
    assert.equal(grant.success, true, JSON.stringify(grant));

    careless = open(8, { withCredentials: false });
    const refused = new Promise((resolve) => careless.socket.once('connect_error', resolve));
    const error = await within(10_000, 'its session is unknown to the other replica', refused);
    assert.match(error.message, /^xhr (poll|post) error$/);
    assert.equal(error.description, 400);
  } finally {
    buyer.socket.disconnect();
    careless?.socket.disconnect();
    await sticky.stop();
  }
});
