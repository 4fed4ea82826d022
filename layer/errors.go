package layer

import (
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// ErrCorrupt matches, through errors.Is, every error that is the fault of the layer's bytes themselves: a digest or diffID that
// does not hold, a broken compression stream, a hostile tar, a bomb. Such a layer is never retried and never fallen back from.
var ErrCorrupt = errors.New("corrupt layer")

// ErrUnsupported is a layer that cannot be unpacked apart from the layers below it, which is no fault of its bytes: a hard link in
// it may lead to a file of theirs.
var ErrUnsupported = errors.New("layer that needs the layers below it")

// ErrTooLarge is a layer whose decoder would take more memory than layers have: a window that `zstd --long` makes. Others may have it.
var ErrTooLarge = errors.New("layer that takes too much memory to decode")

// ErrNoImage is a layer that cannot be an EROFS image, though it may be a directory: it has more names than there is memory for,
// or attributes that the format has no room for.
var ErrNoImage = errors.New("layer that cannot be an image")

// CorruptError says which layer is wrong, and how. It matches ErrCorrupt.
type CorruptError struct {
	// Layer is the digest of the blob as the manifest names it.
	Layer digest.Digest
	// Reason is for people: it names the tar entry, or the digests, or the limit with the flag that raises it.
	Reason string
	// Err is the cause, if another package found it; may be nil.
	Err error
}

func (e *CorruptError) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("corrupt layer %s: %s: %v", e.Layer, e.Reason, e.Err)
	}
	return fmt.Sprintf("corrupt layer %s: %s", e.Layer, e.Reason)
}

// Unwrap gives the cause.
func (e *CorruptError) Unwrap() error { return e.Err }

// Is makes every CorruptError match ErrCorrupt.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// refusal is a tar entry that will not be unpacked; the extractor turns it into a CorruptError with the layer and the entry.
type refusal struct {
	reason string
	err    error
}

func (e *refusal) Error() string { return e.reason }
func (e *refusal) Unwrap() error { return e.err }

func refuse(format string, args ...any) error {
	return &refusal{reason: fmt.Sprintf(format, args...)}
}

// refuseErrno turns the errors that only an ill-formed entry can provoke into refusals; faults of the disk stay what they are.
func refuseErrno(op string, err error) error {
	for _, bad := range []error{unix.ENAMETOOLONG, unix.ENOTDIR, unix.EISDIR, unix.ELOOP} {
		if errors.Is(err, bad) {
			return &refusal{reason: op, err: err}
		}
	}
	return fmt.Errorf("%s: %w", op, err)
}

// corruptEntry gives a refusal the layer and the entry it is about, and names the entry in any other error.
func corruptEntry(layer digest.Digest, entry string, err error) error {
	if len(entry) > 256 {
		entry = entry[:256] + "…"
	}
	var r *refusal
	if errors.As(err, &r) {
		return &CorruptError{Layer: layer, Reason: fmt.Sprintf("entry %q: %s", entry, r.reason), Err: r.err}
	}
	return fmt.Errorf("entry %q: %w", entry, err)
}
