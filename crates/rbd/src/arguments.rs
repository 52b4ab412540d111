//! The command line. No secret is on it: the cluster's key is in the keyring, which librados reads.

use std::{
    ffi::{CString, OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
};

use vmseal_rbd::{
    cluster::{ImageName, PATIENCE_S},
    image::TakeOver,
};

pub(crate) const USAGE: &str = "\
usage: vmseal-rbd [serve] IMAGE --socket PATH [--take-over OWNER | --take-over-from-anybody] [--same OFFSET:HEX]
       vmseal-rbd info IMAGE                       what the image is and who has it open
       vmseal-rbd read IMAGE --offset N --bytes N  bytes of it, on standard output
       vmseal-rbd create IMAGE --bytes N
       vmseal-rbd rename IMAGE --to NAME
       vmseal-rbd remove IMAGE
       vmseal-rbd fence IMAGE                      takes the lock from whoever has it, blocklists that client, gives it back
       vmseal-rbd check                            whether librbd can be used
IMAGE: --pool POOL --image IMAGE [--namespace NAME] [--user USER] [--conf FILE] [--monitors ADDRESSES]
       [--keyring FILE] [--patience SECONDS]

serve takes the image's exclusive lock and serves the disk process that listens at PATH, until that is gone. It says
`owner NAME` on standard output once the lock is held. --take-over breaks the lock of OWNER and blocklists it. --same
refuses an image that has other bytes there.
Exit codes: 0 ended in order, 1 failed, 2 wrong usage, 3 another client holds or held the lock, 4 no such image, 5 the
name is taken, 6 librbd is missing.
";

/// What is asked for.
pub(crate) struct Arguments {
    pub(crate) name: ImageName,
    pub(crate) what: What,
}

/// What to do.
pub(crate) enum What {
    Version,
    Check,
    Serve(Serve),
    Info,
    Fence,
    Read { offset: u64, length: usize },
    Create { bytes: u64 },
    Rename { to: CString },
    Remove,
}

/// How to serve.
pub(crate) struct Serve {
    pub(crate) socket: PathBuf,
    pub(crate) take_over: TakeOver,
    pub(crate) same: Option<(u64, Vec<u8>)>,
}

/// Most bytes of one `read`: a header.
const MAX_READ: usize = 16 << 20;

/// `None`: wrong usage.
pub(crate) fn parse(arguments: Vec<OsString>) -> Option<Arguments> {
    let mut arguments = arguments.into_iter().peekable();
    let verb = match arguments.peek().map(|first| first.as_bytes()) {
        Some(b"--version" | b"-V") => b"version".to_vec(),
        Some(first) if !first.starts_with(b"-") => arguments.next()?.into_vec(),
        _ => b"serve".to_vec(),
    };
    let mut values: Vec<(Vec<u8>, CString)> = Vec::new();
    let mut take_over = TakeOver::No;
    while let Some(option) = arguments.next() {
        if option == "--take-over-from-anybody" && verb == b"serve" {
            take_over = TakeOver::Anybody;
            continue;
        }
        if verb == b"version" {
            continue;
        }
        values.push((option.into_vec(), CString::new(arguments.next()?.into_vec()).ok()?));
    }
    let mut take = |name: &[u8]| {
        let at = values.iter().position(|(option, _)| option == name)?;
        Some(values.swap_remove(at).1)
    };
    let number = |value: CString| value.to_str().ok()?.parse::<u64>().ok();
    let without_image = matches!(&verb[..], b"version" | b"check");
    let needed = |value: Option<CString>| if without_image { Some(value.unwrap_or_default()) } else { value };
    let name = ImageName {
        pool: needed(take(b"--pool"))?,
        image: needed(take(b"--image"))?,
        namespace: take(b"--namespace"),
        user: take(b"--user").unwrap_or_else(|| c"admin".into()),
        conf: take(b"--conf"),
        monitors: take(b"--monitors"),
        keyring: take(b"--keyring"),
        patience_s: match take(b"--patience") {
            Some(value) => u32::try_from(number(value)?).ok()?,
            None => PATIENCE_S,
        },
    };
    let what = match &verb[..] {
        b"version" => What::Version,
        b"check" => What::Check,
        b"serve" => {
            if let Some(owner) = take(b"--take-over") {
                take_over = TakeOver::From(owner.into_string().ok()?);
            }
            let socket = take(b"--socket")?;
            What::Serve(Serve {
                socket: PathBuf::from(OsStr::from_bytes(socket.as_bytes())),
                take_over,
                same: match take(b"--same") {
                    Some(same) => Some(bytes_at(same.to_str().ok()?)?),
                    None => None,
                },
            })
        }
        b"info" => What::Info,
        b"fence" => What::Fence,
        b"read" => {
            let length = usize::try_from(number(take(b"--bytes")?)?).ok()?;
            What::Read {
                offset: number(take(b"--offset")?)?,
                length: (length <= MAX_READ).then_some(length)?,
            }
        }
        b"create" => What::Create { bytes: number(take(b"--bytes")?)? },
        b"rename" => What::Rename { to: take(b"--to")? },
        b"remove" => What::Remove,
        _ => return None,
    };
    // What is left is not understood, or was said twice.
    values.is_empty().then_some(Arguments { name, what })
}

/// `OFFSET:HEX`.
fn bytes_at(text: &str) -> Option<(u64, Vec<u8>)> {
    let (offset, hex) = text.split_once(':')?;
    let digits: Option<Vec<u8>> = hex.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some((offset.parse().ok()?, digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Option<Arguments> {
        parse(line.split_whitespace().map(Into::into).collect())
    }

    #[test]
    fn helper_is_started_with_or_without_its_word() {
        for line in ["--pool p --image i --socket /s", "serve --socket /s --image i --pool p"] {
            let arguments = read(line).unwrap();
            assert_eq!(arguments.name.shown(), "p/i");
            let What::Serve(order) = arguments.what else { panic!("it is to serve") };
            assert_eq!((order.take_over, order.same), (TakeOver::No, None));
        }
        let line = "serve --pool p --namespace n --image i --socket /s --take-over o --same 15:00ff --user u";
        let arguments = read(line).unwrap();
        assert_eq!((arguments.name.shown().as_str(), arguments.name.user.as_c_str()), ("p/n/i", c"u"));
        let What::Serve(order) = arguments.what else { panic!("it is to serve") };
        assert_eq!((order.take_over, order.same), (TakeOver::From("o".into()), Some((15, vec![0, 255]))));
    }

    #[test]
    fn wrong_usage_is_none() {
        for line in [
            "",
            "serve",
            "info --pool p",
            "info --pool p --image i --bytes 5",
            "read --pool p --image i --offset 0 --bytes 99999999",
            "serve --pool p --image i --socket /s --same 15",
            "serve --pool p --image i --socket /s --same 15:0",
            "info --take-over-from-anybody --pool p --image i",
            "erase --pool p --image i",
            "info --pool p --image i --image j",
        ] {
            assert!(read(line).is_none(), "{line}");
        }
        assert!(matches!(read("check").unwrap().what, What::Check));
        assert!(matches!(read("-V").unwrap().what, What::Version));
    }
}
