//! The lowest epoch a record may have, asked of the server: the other half is the agent's own store.
//!
//! An answer within the deadline or none; none is no refusal, since a host must start its VMs without the server too.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    time::Duration,
};

use vmseal_api::agent::v1::{FloorReply, FloorRequest, from_agent::Body};
use vmseal_keys::random_bytes;
use vmseal_model::{
    id::{DiskId, TaskId},
    record::MAX_RECORD_LEN,
};

use crate::uplink::Uplink;

/// What the server knows of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFloor {
    /// Lowest epoch accepted.
    pub epoch: u64,
    /// Its copy of the record; a candidate like the others. Empty if it has none.
    pub record: Vec<u8>,
}

/// By disk; a disk the server never heard of is not in it.
pub type ServerFloors = HashMap<DiskId, ServerFloor>;

/// Asks for floors.
pub struct Floors {
    uplink: Arc<Uplink>,
    asked: Mutex<HashMap<String, SyncSender<ServerFloors>>>,
}

impl Floors {
    /// Asks over this uplink.
    pub fn new(uplink: Arc<Uplink>) -> Self {
        Self { uplink, asked: Mutex::default() }
    }

    /// The floors of these disks; none if the server does not say so in time.
    pub fn ask(&self, disks: &[DiskId], deadline: Duration) -> Option<ServerFloors> {
        let request_id = TaskId::from_random(random_bytes().ok()?).to_string();
        let (out, answer) = sync_channel(1);
        self.lock().insert(request_id.clone(), out);
        let disk_ids = disks.iter().map(DiskId::to_string).collect();
        let sent =
            self.uplink.send(Body::FloorRequest(FloorRequest { request_id: request_id.clone(), disk_ids }));
        let floors = sent.ok().and_then(|()| answer.recv_timeout(deadline).ok());
        self.lock().remove(&request_id);
        floors
    }

    /// Takes an answer.
    pub fn answered(&self, reply: FloorReply) {
        let Some(out) = self.lock().remove(&reply.request_id) else { return };
        let floors = reply.floors.into_iter().filter(|f| f.record.len() <= MAX_RECORD_LEN);
        let floors = floors.filter_map(|f| {
            Some((f.disk_id.parse().ok()?, ServerFloor { epoch: f.epoch, record: f.record }))
        });
        let _ = out.try_send(floors.collect());
    }

    /// The session broke: nobody waits for its answers any longer.
    pub fn session_lost(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, SyncSender<ServerFloors>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use vmseal_api::agent::v1::Floor;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn answer_goes_to_who_asked() {
        let uplink = Arc::new(Uplink::new("not joined"));
        let (out, mut sent) = tokio::sync::mpsc::channel(1);
        uplink.opened(out);
        let floors = Floors::new(uplink);
        let disk = DiskId::from_bytes([3; 16]);
        thread::scope(|scope| {
            let asking = scope.spawn(|| floors.ask(&[disk], LONG));
            let Some(Body::FloorRequest(request)) = sent.blocking_recv().unwrap().body else {
                panic!("a request")
            };
            assert_eq!(request.disk_ids, [disk.to_string()]);
            floors.answered(FloorReply { request_id: "another".into(), floors: vec![] });
            let floor = Floor { disk_id: disk.to_string(), epoch: 4, record: vec![1] };
            let strange = Floor { disk_id: "no id".into(), epoch: 9, record: vec![] };
            floors.answered(FloorReply { request_id: request.request_id, floors: vec![floor, strange] });
            let expected = HashMap::from([(disk, ServerFloor { epoch: 4, record: vec![1] })]);
            assert_eq!(asking.join().unwrap(), Some(expected));
        });
        assert_eq!(floors.ask(&[disk], Duration::from_millis(1)), None);
    }

    #[test]
    fn without_a_session_there_is_no_answer_and_no_wait() {
        let floors = Floors::new(Arc::new(Uplink::new("not joined")));
        assert_eq!(floors.ask(&[], LONG), None);
        assert!(floors.lock().is_empty());
    }
}
