'use strict';
// An orders-service written by somebody who read only docs/integration-orders.md: its code is that page's.
//
// Settings: {amqp, queue, events}: the broker and the queues of Seatlock and of the events-service.

const { common, core, microservices, rxjs, serve, settings } = require('./nest.js');
const { block, run } = require('../lib/guide.js');

const { OrderRefused, OrdersService } = run(block('integration-orders.md', 'orders.service'), { ...rxjs });
const environment = { env: { AMQP_URL: settings.amqp, REALTIME_QUEUE: settings.queue, EVENTS_QUEUE: settings.events } };
const { ordersModule } = run(block('integration-orders.md', 'orders.module'), { ...microservices, OrdersService, process: environment });

class OrdersModule {}
common.Module(ordersModule)(OrdersModule);

async function main() {
  const app = await core.NestFactory.createApplicationContext(OrdersModule, { logger: ['error', 'warn'] });
  const orders = app.get(OrdersService);
  const refusal = (error) => {
    throw error instanceof OrderRefused ? { message: error.message, code: error.code } : error;
  };
  serve({
    'create-order': (order) => orders.createOrder(order).catch(refusal),
    'create-order-with-lock': (order) => orders.createOrderWithLock(order).catch(refusal),
  });
}

main();
