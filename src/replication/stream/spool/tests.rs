use super::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::os::fd::AsRawFd;
use tempfile::TempDir;

fn seeded() -> StdRng {
    let seed = match std::env::var("WARM_SPARE_SEED") {
        Ok(text) => text.parse().expect("WARM_SPARE_SEED is a number"),
        Err(_) => rand::random::<u32>().into(),
    };
    println!("WARM_SPARE_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn data(length: usize, mark: u64) -> Frame {
    let mut bytes = vec![b'x'; length];
    let mark = mark.to_be_bytes();
    let room = length.min(8);
    bytes[..room].copy_from_slice(&mark[..room]);
    Frame::Data(bytes.into())
}

/// Returns the sizes of the files without a name that this process holds open in the folder.
fn files_in(dir: &Path) -> Vec<u64> {
    let open = std::fs::read_dir("/proc/self/fd").expect("our open files");
    open.flatten()
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|to| to.starts_with(dir)))
        .filter_map(|entry| std::fs::metadata(entry.path()).ok())
        .map(|file| file.len())
        .collect()
}

/// The expected output: frames in order, and of consecutive positions the last one.
#[derive(Default)]
struct Model {
    queue: VecDeque<Frame>,
}

impl Model {
    fn send(&mut self, frame: Frame) {
        if matches!(frame, Frame::Reached(_))
            && matches!(self.queue.back(), Some(Frame::Reached(_)))
        {
            self.queue.pop_back();
        }
        self.queue.push_back(frame);
    }
}

#[test]
fn the_order_is_kept_however_both_ends_take_turns() {
    let mut random = seeded();
    let dir = folder();
    for _ in 0..40 {
        let memory = random.random_range(0..4000);
        let (mut sender, mut receiver) = spool(memory, 1 << 20, dir.path());
        let mut model = Model::default();
        let (mut longest, mut on_disk) = (0, false);
        for turn in 0..600 {
            // The sender and the receiver are faster in turn.
            let sends = if turn / 100 % 2 == 0 { 0.7 } else { 0.3 };
            if random.random_bool(sends) {
                let frame = if random.random_bool(0.3) {
                    Frame::Reached(Lsn(turn))
                } else if random.random_bool(0.02) {
                    data(random.random_range(0..10_000), turn)
                } else {
                    data(random.random_range(0..200), turn)
                };
                longest = longest.max(frame.cost());
                sender.send(frame.clone()).expect("there is room");
                model.send(frame);
            } else {
                let frame = receiver.try_recv().expect("it can be read");
                assert_eq!(frame, model.queue.pop_front(), "turn {turn}");
            }
            let held = sender.held();
            assert_eq!(held, receiver.held());
            let most = memory.max(longest) + COST;
            assert!(held.memory <= most, "{held:?} of {memory}");
            on_disk |= held.disk > 0;
        }
        assert!(on_disk || memory > 2000, "{memory} bytes were enough");
        drop(sender);
        while let Some(frame) = receiver.try_recv().expect("it can be read") {
            assert_eq!(Some(frame), model.queue.pop_front());
        }
        assert!(model.queue.is_empty());
        assert_eq!(receiver.held(), Held::default());
        assert!(files_in(dir.path()).is_empty(), "everything is given back");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ends_may_work_at_once() {
    const FRAMES: u64 = 20_000;
    let dir = folder();
    let (mut sender, mut receiver) = spool(10_000, 1 << 30, dir.path());
    let mut random = seeded();
    let reader = tokio::spawn(async move {
        let mut next = 0;
        while let Some(frame) = receiver.recv().await.expect("it can be read") {
            match frame {
                Frame::Data(bytes) => {
                    let mark = bytes[..8].try_into().expect("eight bytes");
                    assert_eq!(u64::from_be_bytes(mark), next);
                    next += 1;
                }
                Frame::Reached(lsn) => assert_eq!(lsn.0, next, "all before it has come"),
            }
        }
        next
    });
    for mark in 0..FRAMES {
        let frame = data(random.random_range(8..500), mark);
        sender.send(frame).expect("there is room");
        if random.random_bool(0.2) {
            sender
                .send(Frame::Reached(Lsn(mark + 1)))
                .expect("there is room");
        }
        if random.random_bool(0.001) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
    drop(sender);
    assert_eq!(reader.await.expect("it ends well"), FRAMES);
}

#[test]
fn what_was_read_is_given_back_while_more_is_written() {
    let dir = folder();
    let (mut sender, mut receiver) = spool(1000, 1 << 20, dir.path());
    // The receiver never catches up, and twenty times the limit passes through in all.
    for mark in 0..300 {
        sender.send(data(1000, mark)).expect("there is room");
    }
    for mark in 300..20_000 {
        assert!(matches!(receiver.try_recv(), Ok(Some(Frame::Data(_)))));
        sender.send(data(1000, mark)).expect("there is room");
        if mark % 500 == 0 {
            let files = files_in(dir.path());
            assert_eq!(files.iter().sum::<u64>(), sender.held().disk);
            assert!(sender.held().disk <= 500_000, "{files:?}");
        }
    }
    while let Ok(Some(_)) = receiver.try_recv() {}
    assert!(files_in(dir.path()).is_empty());
    assert_eq!(sender.held(), Held::default());
    sender.send(data(10, 1)).expect("there is room");
    assert_eq!(receiver.try_recv().expect("it is read"), Some(data(10, 1)));
}

#[tokio::test]
async fn a_full_spool_keeps_what_it_has() {
    let dir = folder();
    let (mut sender, mut receiver) = spool(1000, 5000, dir.path());
    let mut sent = 0;
    let error = loop {
        match sender.send(data(500, sent)) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SpoolError::Full { limit: 5000 }), "{error}");
    assert!((8..12).contains(&sent), "{sent} frames of 500 in 6000");
    assert!(sender.held().disk <= 5000);
    for mark in 0..sent {
        // A position would mean that the frame that was not stored had come.
        assert!(sender.send(Frame::Reached(Lsn(7))).is_err());
        assert!(sender.send(data(0, 0)).is_err());
        assert_eq!(receiver.try_recv().expect("read"), Some(data(500, mark)));
    }
    assert!(sender.send(data(0, 0)).is_err(), "there is room again");
    drop(sender);
    let end = receiver.recv().await.expect_err("the cause");
    assert!(end.to_string().starts_with("5000 bytes of changes wait"));
}

#[test]
fn a_frame_longer_than_memory_passes_through() {
    let dir = folder();
    let (mut sender, mut receiver) = spool(100, 4 << 20, dir.path());
    let lengths = [1_000_000, 1_000_000, 3, 600_000, 0];
    for (mark, length) in lengths.iter().enumerate() {
        sender
            .send(data(*length, mark as u64))
            .expect("there is room");
    }
    assert!(sender.held().disk > 1_600_000);
    for (mark, length) in lengths.iter().enumerate() {
        let frame = receiver.try_recv().expect("read");
        assert_eq!(frame, Some(data(*length, mark as u64)));
        assert!(receiver.held().memory <= COST + 3, "{:?}", receiver.held());
    }
}

#[test]
fn a_disk_that_takes_no_more_loses_nothing() {
    let dir = folder();
    let (mut sender, mut receiver) = spool(100, 1 << 20, dir.path());
    sender.send(data(200, 0)).expect("in memory");
    sender.send(data(200, 1)).expect("on disk");
    sender.send(Frame::Reached(Lsn(1))).expect("the tail");
    // A file that can be read and not written simulates a full disk.
    let mut state = sender.0.state();
    let last = state.segments.back_mut().expect("a file");
    let path = format!("/proc/self/fd/{}", last.file.as_raw_fd());
    last.file = Arc::new(File::open(path).expect("it can be read"));
    drop(state);
    let error = sender.send(data(200, 2)).expect_err("not written");
    assert!(
        error
            .to_string()
            .starts_with("cannot write a spool file in /"),
        "{error}"
    );
    let got: Vec<Frame> = std::iter::from_fn(|| receiver.try_recv().expect("read")).collect();
    let sent = [data(200, 0), data(200, 1), Frame::Reached(Lsn(1))];
    assert_eq!(got, sent);
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let dir = folder().path().join("none");
    let (mut sender, mut receiver) = spool(100, 1 << 20, &dir);
    sender.send(data(100, 0)).expect("in memory");
    let error = sender.send(data(100, 1)).expect_err("no folder");
    let said = format!("cannot make a spool file in {}", dir.display());
    assert!(error.to_string().starts_with(&said), "{error}");
    assert_eq!(receiver.try_recv().expect("read"), Some(data(100, 0)));
}

#[tokio::test]
async fn each_end_notices_that_the_other_is_gone() {
    let dir = folder();
    let (mut sender, mut receiver) = spool(100, 1 << 20, dir.path());
    for mark in 0..3 {
        sender.send(data(100, mark)).expect("there is room");
    }
    sender.fail("cut".into());
    for mark in 0..3 {
        let frame = receiver.recv().await.expect("it was sent before");
        assert_eq!(frame, Some(data(100, mark)));
    }
    for _ in 0..2 {
        let error = receiver.recv().await.expect_err("the failure");
        assert_eq!(error.to_string(), "cut");
    }

    let (sender, mut receiver) = spool(100, 1 << 20, dir.path());
    let waiting = tokio::spawn(async move { receiver.recv().await });
    drop(sender);
    assert!(matches!(waiting.await.expect("it ends"), Ok(None)));

    let (mut sender, receiver) = spool(100, 1 << 20, dir.path());
    sender.send(data(200, 0)).expect("in memory");
    sender.send(data(200, 1)).expect("on disk");
    drop(receiver);
    assert!(files_in(dir.path()).is_empty());
    let error = sender.send(data(1, 1)).expect_err("nobody reads");
    assert!(matches!(error, SpoolError::Abandoned));
}

#[test]
fn only_we_can_open_the_files() {
    let dir = folder();
    let (mut sender, _receiver) = spool(0, 1 << 20, dir.path());
    sender.send(data(1, 0)).expect("in memory");
    sender.send(data(1, 1)).expect("on disk");
    let file = sender.0.state().segments[0].file.clone();
    let mode = file.metadata().expect("its facts").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let names = std::fs::read_dir(dir.path()).expect("the folder");
    assert_eq!(names.count(), 0, "it has no name");
}
