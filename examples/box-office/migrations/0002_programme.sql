-- A few events to sell.

insert into events.event (id, name, kind, description, starts_at, location) values
    (1, 'Harbour Jazz Night', 'music', 'Two stages and the tide', '2031-06-21 19:30+00', 'Pier 4'),
    (2, 'The Last Ten Seats', 'theatre', 'Almost sold out since spring', '2031-07-02 20:00+00', 'Old Playhouse'),
    (3, 'Stadium On-Sale', 'music', 'Everybody wants to go', '2031-08-30 18:00+00', 'North Stadium');

insert into events.category (id, event_id, name, price, total_seats, reserved_seats, is_active) values
    (1, 1, 'Front row', 95.00, 12, 2, true),
    (2, 1, 'Deck', 55.00, 80, 31, true),
    (3, 1, 'Standing', 25.00, 200, 64, true),
    (4, 2, 'Stalls', 40.00, 300, 290, true),
    (5, 2, 'Balcony', 30.00, 150, 150, true),
    (6, 3, 'Golden circle', 140.00, 60, 0, true),
    (7, 3, 'Lower tier', 75.00, 240, 0, true),
    (8, 3, 'Upper tier', 45.00, 500, 0, true);
