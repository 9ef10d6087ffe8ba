'use strict';
// Claim: the peers of these tests speak as the running systems do, so what Seatlock gets from them is the real thing.
// Provoked by: each Nest major and transport asked by the other major's client, and compared with recorded bodies.

const assert = require('node:assert/strict');
const { failure } = require('../lib/check.js');
const { scenario } = require('../lib/scenario.js');

const EVENTS = [{ id: 3, categories: [{ id: 4, total: 4 }, { id: 5, total: 2, reserved: 2 }] }];

for (const [transport, major, caller] of [['tcp', 10, 11], ['tcp', 11, 10], ['rmq', 10, 11], ['rmq', 11, 10]]) {
  scenario(`peers: an events-service over ${transport} on Nest ${major} answers Nest ${caller}`, async (stage) => {
    const stock = await stage.events({ transport, major, events: EVENTS });
    const orders = await stage.orders(caller);
    const ask = (pattern, data) => orders.call('ask-events', { pattern, data });

    const categories = await ask('get-ticket-categories', 3);
    assert.deepEqual(categories[1], {
      id: 5, categoryName: 'Category 5', price: '100.00', totalSeats: 2, reservedSeats: 2, description: null,
      isActive: true, eventId: 3, availableSeats: 0,
    });
    const event = await ask('get-event-by-id', 3);
    assert.equal(event.idEvent, 3);
    assert.equal(event.ticketCategories.length, 2);
    assert.ok(!('availableSeats' in event.ticketCategories[0]));

    assert.deepEqual(await failure(ask('get-event-by-id', 99)), {
      error: { statusCode: 404, message: 'Event with ID 99 not found', error: 'Not Found' },
      message: 'Event with ID 99 not found',
    });
    assert.equal(
      await failure(ask('no-such-pattern', 1)),
      'There is no matching message handler defined in the remote service.',
    );

    assert.equal(await ask('reserve-tickets', { eventId: 3, categoryId: 4, quantity: 3 }), true);
    const refusal = await failure(ask('reserve-tickets', { eventId: 3, categoryId: 4, quantity: 2 }));
    assert.equal(refusal.message, 'Not enough seats available. Only 1 seats left');
    assert.equal(await ask('release-tickets', { eventId: 3, categoryId: 4, quantity: 3 }), true);
    assert.equal((await stock.call('read', { eventId: 3 }))[0].availableSeats, 4);
  });
}

scenario('peers: fifty reservations at once of ten seats, exactly ten succeed', async (stage) => {
  await stage.events({ transport: 'tcp', major: 11, events: [{ id: 1, categories: [{ id: 1, total: 10 }] }] });
  const orders = await stage.orders(11);
  const one = () => orders.call('ask-events', {
    pattern: 'reserve-tickets', data: { eventId: 1, categoryId: 1, quantity: 1 },
  });
  const answers = await Promise.allSettled(Array.from({ length: 50 }, one));
  assert.equal(answers.filter(({ status }) => status === 'fulfilled').length, 10);
});
