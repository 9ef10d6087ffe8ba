'use strict';
// The orders-service: asks Seatlock over RabbitMQ and the events-service over its own transport, in both flows that
// run today. The order is its own business; what matters here is whom it asks, in which order, and what it does when
// one of them says no.
//
// Settings: {amqp, queue, events: {transport: 'tcp', port} | {transport: 'rmq', queue}}

const { common, core, inject, microservices, rxjs, serve, settings } = require('./nest.js');

const { ClientsModule, Transport } = microservices;

class OrdersService {
  constructor(realtime, events) {
    this.realtime = realtime;
    this.events = events;
  }

  send(pattern, data) {
    return rxjs.firstValueFrom(this.realtime.send(pattern, data));
  }

  /** validate-user-locks, reserve-tickets, confirm-ticket-lock, order-completed. */
  async createOrder({ orderId, userId, eventId, categoryId, quantity }) {
    const order = { orderId, eventId, categoryId, quantity, userId };
    const found = await this.send('validate-user-locks', { userId, eventId, categoryId, quantity });
    if (!found.valid) throw { message: found.message, code: found.code };
    await this.reserve(order, found.lockId);
    const confirmed = await this.send('confirm-ticket-lock', { lockId: found.lockId });
    if (!confirmed) {
      await rxjs.firstValueFrom(this.events.send('release-tickets', { eventId, categoryId, quantity }));
      await this.cancel(order, found.lockId);
      throw { message: 'Ticket locks have expired. Please select tickets again.' };
    }
    await this.emit('order-completed', order);
    return { lockId: found.lockId, expiresAt: found.expiresAt };
  }

  /** confirm-lock, reserve-tickets, order-completed. */
  async createOrderWithLock({ orderId, userId, eventId, categoryId, quantity, lockId }) {
    const order = { orderId, eventId, categoryId, quantity, userId };
    const confirmed = await this.send('confirm-lock', { lockId, userId });
    if (!confirmed) throw { message: 'Invalid or expired lock' };
    await this.reserve(order, lockId);
    await this.emit('order-completed', { ...order, lockId });
    return { lockId };
  }

  async reserve(order, lockId) {
    const { eventId, categoryId, quantity } = order;
    try {
      await rxjs.firstValueFrom(this.events.send('reserve-tickets', { eventId, categoryId, quantity }));
    } catch (refusal) {
      await this.cancel(order, lockId);
      throw refusal;
    }
  }

  async cancel(order, lockId) {
    await this.send('release-ticket-lock', { lockId });
    await this.emit('order-cancelled', order);
  }

  emit(pattern, data) {
    return rxjs.lastValueFrom(this.realtime.emit(pattern, data), { defaultValue: null });
  }
}
inject(OrdersService, 'REALTIME', 'EVENTS');
common.Injectable()(OrdersService);

const durable = (queue) => ({
  transport: Transport.RMQ,
  options: { urls: [settings.amqp], queue, queueOptions: { durable: true } },
});

class OrdersModule {}
common.Module({
  imports: [
    ClientsModule.register([
      { name: 'REALTIME', ...durable(settings.queue) },
      {
        name: 'EVENTS',
        ...(settings.events.transport === 'tcp'
          ? { transport: Transport.TCP, options: { host: '127.0.0.1', port: settings.events.port } }
          : durable(settings.events.queue)),
      },
    ]),
  ],
  providers: [OrdersService],
})(OrdersModule);

async function main() {
  const app = await core.NestFactory.createApplicationContext(OrdersModule, { logger: ['error', 'warn'] });
  const orders = app.get(OrdersService);
  serve({
    connect: async () => { await orders.realtime.connect(); },
    'create-order': (order) => orders.createOrder(order),
    'create-order-with-lock': (order) => orders.createOrderWithLock(order),
    send: ({ pattern, data }) => orders.send(pattern, data),
    emit: ({ pattern, data }) => orders.emit(pattern, data),
    'ask-events': ({ pattern, data }) => rxjs.firstValueFrom(orders.events.send(pattern, data)),
  });
}

main();
