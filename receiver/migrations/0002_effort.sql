-- What a backup may cost, as a policy asks for it. NULL: the host's settings stand.
ALTER TABLE snapshot_policies ADD COLUMN compression_level INTEGER;
ALTER TABLE snapshot_policies ADD COLUMN priority TEXT;
ALTER TABLE snapshot_policies ADD COLUMN force_read INTEGER;
ALTER TABLE snapshot_policies ADD COLUMN skip_caches INTEGER;
