//! A writer within a guest, which knows at any time what is surely on its disk, and the check of it afterwards.

use std::time::Duration;

use crate::{console::Console, shell};

const WRITER: &str = r#"cat > /run/writer <<'W'
#!/bin/sh
# Writes numbered 4 KiB blocks, each synced, and says which number is surely on the disk.
n=0
while [ ! -e /run/stop ]; do
  n=$((n+1))
  printf '%0512d%0512d%0512d%0512d%0512d%0512d%0512d%0512d' $n $n $n $n $n $n $n $n > /run/block
  if dd if=/run/block of=/dev/vda bs=4096 seek=$((n % 1000)) count=1 conv=notrunc,fsync 2>/run/dderr; then
    echo $n > /run/acked
  else
    echo "$n: $(cat /run/dderr)" >> /run/errors
  fi
done
echo done > /run/writer-done
W
chmod +x /run/writer; : > /run/errors; rm -f /run/stop /run/writer-done; echo 0 > /run/acked; /run/writer >/dev/null 2>&1 & true"#;

const CHECKER: &str = r#"last=$(cat /run/acked); echo 3 > /proc/sys/vm/drop_caches; bad=0; i=$last; low=$((last > 999 ? last - 998 : 1));
while [ $i -ge $low ]; do
  want=$(printf '%0512d' $i | head -c 512)
  got=$(dd if=/dev/vda bs=512 skip=$((i % 1000 * 8)) count=1 2>/dev/null)
  [ "$want" = "$got" ] || { bad=$((bad+1)); echo "block $i"; }
  i=$((i-1))
done; echo "checked $((last - low + 1)) bad $bad errors $(wc -l < /run/errors)""#;

/// Begins to write to `vda`, which has at least 4 MiB; returns at once.
pub fn begin(console: &mut Console) {
    console.sh(WRITER);
}

/// Number of the last block that is surely on the disk.
pub fn acked(console: &mut Console) -> u64 {
    let mut number = None;
    // The shell's prompt may stand before it; while the writer replaces it, there is none.
    shell::until("the guest says what it wrote", Duration::from_secs(20), || {
        number = console.sh("cat /run/acked").split_whitespace().last().and_then(|word| word.parse().ok());
        number.is_some()
    });
    number.expect("it was waited for")
}

/// Waits until the guest got an acknowledgement after now: I/O goes on.
pub fn goes_on(console: &mut Console, what: &str) {
    let before = acked(console);
    let mut now = before;
    shell::until(&format!("after {what}, the guest's writes go on"), Duration::from_secs(60), || {
        now = acked(console);
        now > before + 1
    });
}

/// Ends the writer, reads every block back and demands that none is bad and no write failed.
pub fn check(console: &mut Console) {
    console.sh("touch /run/stop; while [ ! -e /run/writer-done ]; do sleep 1; done");
    let checked = console.sh(CHECKER);
    assert!(checked.contains("bad 0 errors 0"), "{checked}");
}
