//! A bounded queue between two tasks that takes no memory while it is empty: each socket has two, and nearly all of them
//! nearly always are.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use super::lock;

/// What could not be put into the queue.
#[derive(Debug, PartialEq, Eq)]
pub enum Rejected<T> {
    /// As many wait as may.
    Full(T),
    /// Nobody takes anything any more.
    Closed(T),
}

#[derive(Debug)]
struct Queue<T> {
    state: Mutex<State<T>>,
    /// Somebody waits for an item, or there is one that nobody has waited for.
    waiter: Notify,
    len_max: usize,
}

#[derive(Debug)]
struct State<T> {
    items: VecDeque<T>,
    closed: bool,
}

/// Puts items in. There is one; when it is dropped, the queue ends behind what is in it.
#[derive(Debug)]
pub struct Sender<T>(Arc<Queue<T>>);

/// Takes items out. There is one.
#[derive(Debug)]
pub struct Receiver<T>(Arc<Queue<T>>);

/// An empty queue for at most `len_max` items.
pub fn bounded<T>(len_max: usize) -> (Sender<T>, Receiver<T>) {
    let state = Mutex::new(State { items: VecDeque::new(), closed: false });
    let queue = Arc::new(Queue { state, waiter: Notify::new(), len_max });
    (Sender(Arc::clone(&queue)), Receiver(queue))
}

impl<T> Sender<T> {
    /// Puts an item in, unless the queue is full or closed.
    pub fn try_send(&self, item: T) -> Result<(), Rejected<T>> {
        let mut state = lock(&self.0.state);
        if state.closed {
            return Err(Rejected::Closed(item));
        }
        if state.items.len() >= self.0.len_max {
            return Err(Rejected::Full(item));
        }
        state.items.push_back(item);
        drop(state);
        self.0.waiter.notify_one();
        Ok(())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        lock(&self.0.state).closed = true;
        self.0.waiter.notify_one();
    }
}

impl<T> Receiver<T> {
    /// The next item, as soon as there is one; `None` when the queue is closed and empty. A call that is given up loses
    /// nothing.
    pub async fn recv(&mut self) -> Option<T> {
        loop {
            {
                let mut state = lock(&self.0.state);
                if let Some(item) = state.items.pop_front() {
                    if state.items.is_empty() {
                        state.items = VecDeque::new();
                    }
                    return Some(item);
                }
                if state.closed {
                    return None;
                }
            }
            self.0.waiter.notified().await;
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        lock(&self.0.state).items.is_empty()
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
        state.items = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn items_come_in_order_and_the_queue_is_bounded() {
        let (sender, mut receiver) = bounded(2);
        for round in 0..3 {
            assert_eq!(sender.try_send(round), Ok(()));
            assert_eq!(sender.try_send(round + 1), Ok(()));
            assert_eq!(sender.try_send(9), Err(Rejected::Full(9)));
            assert_eq!((receiver.recv().await, receiver.recv().await), (Some(round), Some(round + 1)));
            assert_eq!(lock(&receiver.0.state).items.capacity(), 0, "empty, it takes no memory");
        }
    }

    #[tokio::test]
    async fn who_waits_is_woken_and_who_gave_up_has_lost_nothing() {
        let (sender, mut receiver) = bounded(2);
        for item in 0..100 {
            assert!(timeout(Duration::from_millis(1), receiver.recv()).await.is_err(), "nothing is there");
            let (got, sent) = tokio::join!(receiver.recv(), async { sender.try_send(item) });
            assert_eq!((got, sent), (Some(item), Ok(())));
        }
    }

    #[tokio::test]
    async fn a_closed_queue_gives_what_is_in_it_and_takes_nothing() {
        let (sender, mut receiver) = bounded(2);
        sender.try_send(1).expect("there is room");
        receiver.close();
        assert_eq!(sender.try_send(2), Err(Rejected::Closed(2)));
        assert_eq!((receiver.recv().await, receiver.recv().await), (Some(1), None));
        let (sender, mut receiver) = bounded(2);
        let (got, ()) = tokio::join!(receiver.recv(), async { drop(sender) });
        assert_eq!(got, None::<u8>);
        let (sender, receiver) = bounded(2);
        drop(receiver);
        assert_eq!(sender.try_send(1), Err(Rejected::Closed(1)));
    }
}
