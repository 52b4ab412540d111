-- What hosts can present disks by, beside NBD: JSON, `{}` before they said.
ALTER TABLE hosts ADD COLUMN capabilities TEXT NOT NULL DEFAULT '{}';

-- What a disk's class was asked for as, and why that became this class.
ALTER TABLE disks ADD COLUMN asked TEXT NOT NULL DEFAULT '';
ALTER TABLE disks ADD COLUMN why TEXT NOT NULL DEFAULT '';
