'use strict';
// The events-service: a NestJS microservice over TCP or over RabbitMQ that owns the stock.
//
// Settings: {transport: 'tcp', port} or {transport: 'rmq', url, queue}; `events`; `withoutCategories` leaves out the
// pattern `get-ticket-categories`, as an older version of the service does.

const { common, core, decorate, inject, microservices, rxjs, serve, settings } = require('./nest.js');
const { Refused, Stock } = require('./stock.js');

const { MessagePattern, RpcException, Transport } = microservices;

class EventsController {
  constructor(stock) {
    this.stock = stock;
  }

  event(id) {
    return this.stock.answer('get-event-by-id', () => this.stock.event(id));
  }

  categories(id) {
    return this.stock.answer('get-ticket-categories', () => this.stock.categories(id));
  }

  reserve(request) {
    return this.stock.answer('reserve-tickets', () => this.stock.reserve(request));
  }

  release(request) {
    return this.stock.answer('release-tickets', () => this.stock.release(request));
  }
}
common.Controller()(EventsController);
inject(EventsController, Stock);
decorate(EventsController, {
  event: MessagePattern('get-event-by-id'),
  reserve: MessagePattern('reserve-tickets'),
  release: MessagePattern('release-tickets'),
  ...(settings.withoutCategories ? {} : { categories: MessagePattern('get-ticket-categories') }),
});

/** The filter of the running system: an exception crosses the wire as `{error: {statusCode, message, error}, message}`. */
class RpcExceptionFilter {
  catch(exception) {
    const body = exception instanceof Refused
      ? exception.body
      : { statusCode: 500, message: exception.message, error: 'Internal Server Error' };
    return rxjs.throwError(() => new RpcException(body));
  }
}
common.Catch()(RpcExceptionFilter);

class EventsModule {}
const stock = new Stock(settings.events);
common.Module({ controllers: [EventsController], providers: [{ provide: Stock, useValue: stock }] })(EventsModule);

async function main() {
  const transport = settings.transport === 'tcp'
    ? { transport: Transport.TCP, options: { host: '127.0.0.1', port: settings.port } }
    : { transport: Transport.RMQ, options: { urls: [settings.url], queue: settings.queue, queueOptions: { durable: true } } };
  const app = await core.NestFactory.createMicroservice(EventsModule, { ...transport, logger: ['error', 'warn'] });
  app.useGlobalFilters(new RpcExceptionFilter());
  await app.listen();
  serve({
    put: async (event) => stock.put(event),
    remove: async ({ eventId }) => { stock.events.delete(eventId); },
    read: async ({ eventId }) => stock.categories(eventId),
    sell: async (sale) => stock.reserve(sale),
    asked: async () => stock.asked,
    delay: async ({ ms }) => { stock.delayMs = ms; },
    reservations: async ({ open }) => { stock.reservations = open; },
  });
}

main();
