-- The box office's own data. Real systems would give each schema a database of its own.

-- ---- events-service: what is sold ----------------------------------------------------------------------------------

create schema events;

create table events.event (
    id bigint primary key,
    name text not null,
    kind text not null,
    description text,
    starts_at timestamptz not null,
    location text not null,
    is_active boolean not null default true,
    created_by bigint not null default 1,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

create table events.category (
    id bigint primary key,
    event_id bigint not null references events.event,
    name text not null,
    price numeric(10, 2) not null,
    total_seats integer not null check (total_seats >= 0),
    reserved_seats integer not null default 0,
    is_active boolean not null default true,
    -- The last guard: whatever the code above it does, no more seats are sold than there are.
    check (reserved_seats between 0 and total_seats)
);
create index on events.category (event_id);

-- What an order reserved. One row for each order, also for one that was released before it reserved: a message that
-- comes late finds the row and changes nothing.
create table events.reservation (
    order_id bigint primary key,
    category_id bigint not null,
    quantity integer not null,
    state text not null check (state in ('reserved', 'released')),
    changed_at timestamptz not null default now()
);

-- ---- orders-service: who bought what -------------------------------------------------------------------------------

create schema orders;

create table orders.purchase (
    id bigint generated always as identity primary key,
    -- Sent by the caller: the same request is the same order.
    request_id uuid not null unique,
    user_id bigint not null,
    event_id bigint not null,
    category_id bigint not null,
    quantity integer not null check (quantity > 0),
    lock_id text,
    flow text not null check (flow in ('validate', 'with_lock')),
    step text not null default 'placed'
        check (step in ('placed', 'held', 'paid', 'reserved', 'completed', 'undoing', 'cancelled')),
    -- Why it is not or will not be completed.
    code text,
    message text,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    -- Which worker has the order in its hands, and until when; when the next step is due.
    lease uuid,
    lease_until timestamptz not null default '-infinity',
    due_at timestamptz not null default now(),
    attempts integer not null default 0
);
create index on orders.purchase (user_id, id desc);
create index on orders.purchase (due_at) where step not in ('completed', 'cancelled');
-- A lock is good for one order of its owner; a stranger who names it stands in nobody's way.
create unique index purchase_lock on orders.purchase (lock_id, user_id) where step <> 'cancelled';

-- What the others have to be told, written in the same transaction as the step it tells of.
create table orders.outbox (
    id bigint generated always as identity primary key,
    pattern text not null,
    data jsonb not null
);

-- ---- the payment provider, simulated -------------------------------------------------------------------------------

create schema payments;

create table payments.payment (
    order_id bigint primary key,
    -- Until `ready_at` nobody knows the outcome; of an abandoned payment nobody ever hears.
    outcome text not null check (outcome in ('paid', 'declined', 'abandoned', 'void', 'refunded')),
    started_at timestamptz not null default now(),
    ready_at timestamptz not null
);
