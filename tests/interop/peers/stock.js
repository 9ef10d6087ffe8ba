'use strict';
// The events-service's table of events, in memory: reservations are atomic, as its SQL makes them.

class Refused extends Error {
  constructor(statusCode, message) {
    super(message);
    this.body = { statusCode, message, error: { 400: 'Bad Request', 404: 'Not Found' }[statusCode] };
  }
}

class Stock {
  constructor(events = []) {
    this.events = new Map();
    this.asked = {};
    this.delayMs = 0;
    this.reservations = true;
    for (const event of events) this.put(event);
  }

  /** `{id, isActive?, categories: [{id, total, reserved?, isActive?}]}` */
  put({ id, isActive = true, categories }) {
    this.events.set(id, {
      idEvent: id,
      eventName: `Event ${id}, café €, 🎫`,
      eventCategory: 'music',
      description: null,
      eventDate: '2031-06-21T19:30:00.000Z',
      location: 'Pier 4',
      isActive,
      createdBy: 25,
      ticketCategories: categories.map((category) => ({
        id: category.id,
        categoryName: `Category ${category.id}`,
        price: '100.00',
        totalSeats: category.total,
        reservedSeats: category.reserved ?? 0,
        description: null,
        isActive: category.isActive ?? true,
        eventId: id,
      })),
      createdAt: '2026-11-22T15:25:01.998Z',
      updatedAt: '2026-11-22T15:25:01.998Z',
    });
  }

  /** Counts the question, waits as long as the runner wants answers to take, and answers with what is true at the end. */
  async answer(pattern, work) {
    this.asked[pattern] = (this.asked[pattern] ?? 0) + 1;
    if (this.delayMs > 0) await new Promise((resolve) => setTimeout(resolve, this.delayMs));
    return work();
  }

  event(id) {
    const event = this.events.get(id);
    if (!event) throw new Refused(404, `Event with ID ${id} not found`);
    return event;
  }

  categories(id) {
    return this.event(id).ticketCategories.map((category) => ({
      ...category,
      availableSeats: category.totalSeats - category.reservedSeats,
    }));
  }

  category(eventId, categoryId) {
    const found = this.event(eventId).ticketCategories.find((category) => category.id === categoryId);
    if (!found) throw new Refused(404, `Ticket category with ID ${categoryId} not found`);
    return found;
  }

  reserve({ eventId, categoryId, quantity }) {
    if (!this.reservations) throw new Refused(400, 'Reservations are suspended');
    const category = this.category(eventId, categoryId);
    const left = category.totalSeats - category.reservedSeats;
    if (quantity > left) throw new Refused(400, `Not enough seats available. Only ${left} seats left`);
    category.reservedSeats += quantity;
    return true;
  }

  release({ eventId, categoryId, quantity }) {
    const category = this.category(eventId, categoryId);
    category.reservedSeats = Math.max(0, category.reservedSeats - quantity);
    return true;
  }
}

module.exports = { Refused, Stock };
