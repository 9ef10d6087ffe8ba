//! A bounded queue between two tasks that asks for no memory while there is one item in it or none: each socket has two,
//! and of nearly all that is nearly always so.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::lock;

/// What could not be put into the queue.
#[derive(Debug, PartialEq, Eq)]
pub enum Rejected<T> {
    /// As many wait as may.
    Full(T),
    /// Nobody takes anything any more.
    Closed(T),
}

/// What could be taken out.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken<T> {
    /// The oldest.
    Item(T),
    /// Nothing is there now.
    Nothing,
    /// Nothing will be there any more.
    Closed,
}

#[derive(Debug)]
struct Queue<T> {
    state: Mutex<State<T>>,
    len_max: usize,
}

#[derive(Debug)]
struct State<T> {
    next: Option<T>,
    /// What is behind it.
    rest: VecDeque<T>,
    closed: bool,
}

/// Puts items in. There is one; when it is dropped, the queue ends behind what is in it.
#[derive(Debug)]
pub struct Sender<T>(Arc<Queue<T>>);

/// Takes items out. There is one.
#[derive(Debug)]
pub struct Receiver<T>(Arc<Queue<T>>);

/// An empty queue for at most `len_max` items. Whoever puts something in wakes whoever is to take it out.
pub fn bounded<T>(len_max: usize) -> (Sender<T>, Receiver<T>) {
    let state = Mutex::new(State { next: None, rest: VecDeque::new(), closed: false });
    let queue = Arc::new(Queue { state, len_max });
    (Sender(Arc::clone(&queue)), Receiver(queue))
}

impl<T> Sender<T> {
    /// Puts an item in, unless the queue is full or closed.
    pub fn try_send(&self, item: T) -> Result<(), Rejected<T>> {
        let mut state = lock(&self.0.state);
        if state.closed {
            return Err(Rejected::Closed(item));
        }
        if state.next.is_none() && self.0.len_max > 0 {
            state.next = Some(item);
        } else if state.rest.len() + 1 < self.0.len_max {
            state.rest.push_back(item);
        } else {
            return Err(Rejected::Full(item));
        }
        Ok(())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        lock(&self.0.state).closed = true;
    }
}

impl<T> Receiver<T> {
    /// The next item, if there is one.
    pub fn try_recv(&mut self) -> Taken<T> {
        let mut state = lock(&self.0.state);
        let Some(item) = state.next.take() else {
            return if state.closed { Taken::Closed } else { Taken::Nothing };
        };
        state.next = state.rest.pop_front();
        if state.next.is_none() {
            state.rest = VecDeque::new();
        }
        Taken::Item(item)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        lock(&self.0.state).next.is_none()
    }

    /// Takes nothing more in; what is in the queue can still be taken out.
    pub fn close(&mut self) {
        lock(&self.0.state).closed = true;
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.closed = true;
        state.next = None;
        state.rest = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_come_in_order_and_the_queue_is_bounded() {
        let (sender, mut receiver) = bounded(2);
        for round in 0..3 {
            assert_eq!(sender.try_send(round), Ok(()));
            assert_eq!(sender.try_send(round + 1), Ok(()));
            assert_eq!(sender.try_send(9), Err(Rejected::Full(9)));
            assert_eq!((receiver.try_recv(), receiver.try_recv()), (Taken::Item(round), Taken::Item(round + 1)));
            assert_eq!(receiver.try_recv(), Taken::Nothing);
            assert_eq!(lock(&receiver.0.state).rest.capacity(), 0, "empty, it takes no memory");
        }
    }

    #[test]
    fn a_closed_queue_gives_what_is_in_it_and_takes_nothing() {
        let (sender, mut receiver) = bounded(2);
        sender.try_send(1).expect("there is room");
        receiver.close();
        assert_eq!(sender.try_send(2), Err(Rejected::Closed(2)));
        assert_eq!((receiver.try_recv(), receiver.try_recv()), (Taken::Item(1), Taken::Closed));
        let (sender, mut receiver) = bounded::<u8>(2);
        drop(sender);
        assert_eq!(receiver.try_recv(), Taken::Closed);
        let (sender, receiver) = bounded(2);
        drop(receiver);
        assert_eq!(sender.try_send(1), Err(Rejected::Closed(1)));
    }
}
