//! Whole conversations made of nearly right bytes: the server may refuse, never panic, and never answer out of step.

use std::{
    fs::OpenOptions,
    io::{self, Cursor, Read, Write},
    os::unix::net::UnixStream,
};

use proptest::{collection::vec, prelude::*};
use vmseal_keys::Dek;
use vmseal_model::{control::ExportKind, id::DiskId};
use vmseal_xts::Cipher;

use super::{handshake, request::Session, transmission, wire::*};
use crate::{
    export::Export,
    store::FileStore,
    volume::{Layout, Volume},
};

/// What a client says, all at once, and what it hears.
struct Line {
    says: Cursor<Vec<u8>>,
    hears: Vec<u8>,
}

impl Read for Line {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.says.read(buf)
    }
}

impl Write for Line {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.hears.extend(buf);
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is left to say, said over a socket; what comes back until the server ends.
fn talk(export: &Export, session: Session, line: &Line) -> Vec<u8> {
    let (mut client, server) = UnixStream::pair().unwrap();
    let says = line.says.get_ref().get(line.says.position() as usize..).unwrap_or_default();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let _ = transmission::run(&server, export, session);
        });
        let mut reader = client.try_clone().unwrap();
        let hears = scope.spawn(move || {
            let mut heard = Vec::new();
            let _ = reader.read_to_end(&mut heard);
            heard
        });
        // A server that has heard enough closes.
        let _ = client.write_all(says);
        let _ = client.shutdown(std::net::Shutdown::Write);
        hears.join().unwrap()
    })
}

fn export() -> Export {
    let path = std::env::temp_dir().join(format!(
        "vmseal-nbd-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let layout = Layout {
        unit: 512,
        payload_offset: 4096,
        presented: 1 << 20,
        grows: true,
        read_only: false,
        discard: true,
    };
    let cipher = Cipher::new(Dek::generate().unwrap().data_key(), 512).unwrap();
    let volume = Volume::new(Box::new(FileStore::new(file, false).unwrap()), cipher, layout).unwrap();
    Export::new(DiskId::from_random([7; 16]), "vda".into(), ExportKind::Nbd, volume)
}

fn options() -> impl Strategy<Value = Vec<u8>> {
    let content = prop_oneof![
        vec(any::<u8>(), 0..40),
        Just(vec![]),
        Just(vec![0; 6]),
        Just(b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation".to_vec()),
    ];
    let option =
        (prop_oneof![8 => 0u32..13, 1 => any::<u32>()], content, prop_oneof![9 => Just(0i32), 1 => -3..3])
            .prop_map(|(option, content, lie)| {
                let mut bytes = IHAVEOPT.to_vec();
                bytes.extend(option.to_be_bytes());
                bytes.extend((content.len() as u32).wrapping_add_signed(lie).to_be_bytes());
                bytes.extend(content);
                bytes
            });
    vec(option, 0..6).prop_map(|options| options.concat())
}

fn requests() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![4 => (0u32..40).prop_map(|n| n * 512), 1 => any::<u32>()];
    let request = (0u16..10, prop_oneof![6 => 0u16..4, 1 => any::<u16>()], number.clone(), number).prop_map(
        |(kind, flags, offset, length)| {
            let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
            bytes.extend(flags.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend([0; 8]);
            bytes.extend(u64::from(offset).to_be_bytes());
            bytes.extend(length.to_be_bytes());
            if kind == CMD_WRITE {
                bytes.resize(bytes.len() + length.min(32768) as usize, 1);
            }
            bytes
        },
    );
    vec(request, 0..8).prop_map(|requests| requests.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_conversation_makes_the_server_panic(
        flags in prop_oneof![9 => Just(3u32), 1 => any::<u32>()], options in options(), go: bool,
        requests in requests(), noise in vec(any::<u8>(), 0..40)
    ) {
        let mut says = flags.to_be_bytes().to_vec();
        says.extend(options);
        if go {
            says.extend(IHAVEOPT);
            says.extend([0, 0, 0, OPT_GO as u8, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0]);
        }
        says.extend(requests);
        says.extend(noise);
        let export = export();
        let mut line = Line { says: Cursor::new(says), hears: Vec::new() };
        let negotiated = handshake::negotiate(&mut line, &export);
        prop_assert!(line.hears.starts_with(b"NBDMAGICIHAVEOPT"));
        if let Ok(Some(session)) = negotiated {
            line.hears.clear();
            let heard = talk(&export, session, &line);
            line.hears = heard;
            let magics = [SIMPLE_REPLY_MAGIC.to_be_bytes(), STRUCTURED_REPLY_MAGIC.to_be_bytes()];
            prop_assert!(line.hears.is_empty() || magics.iter().any(|magic| line.hears.starts_with(magic)));
        }
    }
}
