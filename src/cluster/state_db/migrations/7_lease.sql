-- Format 7: the lease of a shared bucket, as this cluster saw or wrote it last. `number` never falls within a series: a
-- lease with a lower one is of a store that was set back. `fenced_for`: this cluster has fenced itself for a cluster that
-- takes that epoch. `promised_ms`: life of the last lease that this cluster wrote as its holder, if it promised there to fence
-- itself; others rely on it until another lease is written. `touched`: a takeover of this cluster may have written the lease.
CREATE TABLE IF NOT EXISTS lease (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    series text NOT NULL,
    number bigint NOT NULL,
    epoch bigint NOT NULL,
    holder text NOT NULL,
    nonce text NOT NULL,
    fenced_for bigint,
    promised_ms bigint,
    touched boolean NOT NULL DEFAULT false);
