package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// expansion is how much larger than its blob a layer is taken to be before it is unpacked. It only decides how early a pull that
// will not fit is refused.
const expansion = 2

// space keeps the root from filling up: layers stop while containers can still write.
type space struct {
	root     string
	minFree  float64 // percent of the file system; 0: do not look
	maxBytes int64   // of all layers; 0: no quota
	trees    *trees
	sweep    func(context.Context) error // frees layers that no snapshot uses

	mu       sync.Mutex // guards reserved
	reserved int64      // bytes that jobs in flight are expected to need
}

// spaceError is a full disk or quota. It is ENOSPC to us, and exhausted resources to containerd.
type spaceError struct{ reason string }

func (e *spaceError) Error() string {
	return e.reason + ": remove images that nothing uses (crictl rmi --prune), or give the folder a larger disk"
}
func (e *spaceError) Unwrap() []error { return []error{unix.ENOSPC, errdefs.ErrResourceExhausted} }

// reserve makes sure that there is room for a layer, if need be by dropping the layers that no snapshot uses. The caller calls
// release when the layer is on the disk, or is not.
func (s *space) reserve(ctx context.Context, blobBytes int64) (release func(), err error) {
	need := blobBytes * expansion
	if err = s.take(need); err != nil {
		if swept := s.sweep(ctx); swept != nil {
			return nil, fmt.Errorf("%w; and unused layers could not be dropped: %w", err, swept)
		}
		if err = s.take(need); err != nil {
			return nil, err
		}
	}
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reserved -= need
	}), nil
}

// take reserves what is needed if it is there. Of the quota a blob's size is reserved, which its layer is rarely below.
func (s *space) take(need int64) error {
	used, err := s.used()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.fits(need+s.reserved, s.minFree); err != nil {
		return err
	}
	if err := s.within(used + (need+s.reserved)/expansion); err != nil {
		return err
	}
	s.reserved += need
	return nil
}

// fits says whether minFree percent of the file system stay free when so many bytes more are on it.
func (s *space) fits(need int64, minFree float64) error {
	if minFree == 0 {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.root, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", s.root, err)
	}
	free, total := int64(st.Bavail)*int64(st.Bsize), int64(st.Blocks)*int64(st.Bsize)
	if least := int64(float64(total) / 100 * minFree); free-need < least {
		return &spaceError{fmt.Sprintf("%s has %d bytes free, of which a layer may take all but %d (--min-free %g) and needs some %d", s.root, free, least, s.minFree, need)}
	}
	if st.Files > 0 && float64(st.Ffree) < float64(st.Files)/100*minFree { // some make inodes as they need them
		return &spaceError{fmt.Sprintf("%s has %d of %d inodes free, under --min-free %g", s.root, st.Ffree, st.Files, s.minFree)}
	}
	return nil
}

// within says whether layers of so many bytes are in the quota.
func (s *space) within(bytes int64) error {
	if s.maxBytes > 0 && bytes > s.maxBytes {
		return &spaceError{fmt.Sprintf("the layers in %s would take %d bytes of the %d that they may (--max-bytes)", s.root, bytes, s.maxBytes)}
	}
	return nil
}

// used adds up the layers on the disk.
func (s *space) used() (sum int64, err error) {
	if s.maxBytes == 0 {
		return 0, nil
	}
	return s.trees.bytes()
}

// admit says whether a layer that is unpacked, but not among the others yet, is in the quota.
func (s *space) admit(info treeInfo) error {
	used, err := s.used()
	if err != nil {
		return err
	}
	return s.within(used + info.Bytes)
}

// explain names the root in an error of a full disk.
func (s *space) explain(err error) error {
	var ours *spaceError
	if errors.As(err, &ours) || !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	return fmt.Errorf("%w: %w", &spaceError{"the disk of " + s.root + " is full"}, err)
}

// meteredReader counts what is read of a blob, and looks at the disk each time: half of what is to stay free is the limit for a
// layer that turns out larger than it seemed.
type meteredReader struct {
	io.ReadCloser
	sum   *atomic.Int64
	space *space
}

// Read implements io.Reader.
func (r *meteredReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.sum.Add(int64(n))
	if err == nil {
		err = r.space.fits(0, r.space.minFree/2)
	}
	return n, err
}
