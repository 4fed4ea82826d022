package layer

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"math"
	"path"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// sink makes a tree of what the parser reads, in one form or another. Its methods are the phases of a layer, in this order; only
// what write starts runs beside others.
type sink interface {
	// write starts the goroutines that write content.
	write(ctx context.Context, g *errgroup.Group)
	// add makes one entry. Its content is read from the parser's reader.
	add(e *entry) error
	// end is called after the last entry; the goroutines end when they have written what they were given.
	end() error
	// finish does what had to wait for all entries, when every stage has ended well, and tells what was made.
	finish(res *Result) error
	// close gives back what the sink holds, however the layer ended.
	close()
}

// entry is an entry of the tar whose name was checked.
type entry struct {
	*tar.Header
	name         string // clean
	parent, base string
}

// parser reads the tar and hands its entries to the sink.
type parser struct {
	ctx   context.Context
	p     *pipeline
	clock clock
	r     *blockReader
	tr    *tar.Reader
	sink  sink

	entries   int64
	logical   int64 // bytes of sparse files beyond what was in the tar
	textBytes int64
}

func newParser(ctx context.Context, p *pipeline) *parser {
	x := &parser{ctx: ctx, p: p}
	x.r = &blockReader{ctx: ctx, blocks: p.toParse, clock: &x.clock}
	x.tr = tar.NewReader(x.r)
	return x
}

// run reads the tar to the end of the stream.
func (x *parser) run() error {
	x.clock.start()
	defer x.clock.stop()
	layer := x.p.spec.Digest
	for {
		hdr, err := x.tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return x.broken(err)
		}
		if x.entries++; x.entries > x.p.u.limits.MaxEntries {
			return x.p.corrupt(nil, "it has more than %d entries; if it is meant to, raise --layer-max-entries", x.p.u.limits.MaxEntries)
		}
		if err := x.entry(hdr); err != nil {
			if x.ctx.Err() != nil {
				return x.ctx.Err()
			}
			return corruptEntry(layer, hdr.Name, err)
		}
	}
	if err := x.r.drain(); err != nil {
		return err
	}
	return x.sink.end()
}

// broken tells a stream that was cut off from outside from a tar that is broken in itself.
func (x *parser) broken(err error) error {
	if cerr := x.ctx.Err(); cerr != nil {
		return cerr
	}
	return x.p.corrupt(err, "tar breaks after %d entries", x.entries)
}

// entry checks the name of an entry and hands it on.
func (x *parser) entry(hdr *tar.Header) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(hdr.Name)
	if err != nil || name == "." || aufsMeta(name) {
		return err
	}
	e := entry{Header: hdr, name: name, base: name}
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		e.parent, e.base = name[:i], name[i+1:]
	}
	return x.sink.add(&e)
}

// cleanName checks a name of the tar and gives it without ".", ".." and slashes too many; "." is the root.
func cleanName(name string) (string, error) {
	switch {
	case name == "":
		return "", refuse("it has no name")
	case strings.IndexByte(name, 0) >= 0:
		return "", refuse("its name contains a NUL")
	case len(name) > maxPath:
		return "", refuse("its name has %d bytes, more than %d", len(name), maxPath)
	case name[0] == '/':
		return "", refuse("its name is an absolute path")
	}
	name = path.Clean(name)
	if name == ".." || strings.HasPrefix(name, "../") {
		return "", refuse("its name climbs out of the layer")
	}
	return name, nil
}

// keepText accounts for text that is kept to the end.
func (x *parser) keepText(s string) error {
	x.textBytes += int64(len(s)) + 48
	if limit := x.p.u.limits.MaxEntries * pathBytesPerEntry; x.textBytes > max(limit, 1<<20) {
		return refuse("the directories' names take over %d bytes; if they are meant to, raise --layer-max-entries", limit)
	}
	return nil
}

const (
	whiteout     = ".wh."
	whiteoutMeta = ".wh..wh."
	opaque       = ".wh..wh..opq"
)

// aufsMeta tells entries that AUFS left in layers for itself.
func aufsMeta(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if strings.HasPrefix(part, whiteoutMeta) && part != opaque {
			return true
		}
	}
	return false
}

// hidden is the name that a white-out hides.
func (e *entry) hidden() (string, error) {
	name := e.base[len(whiteout):]
	if name == "" || name == "." || name == ".." {
		return "", refuse("white-out of %q", name)
	}
	return name, nil
}

// linkTarget checks the target of a symbolic link.
func (e *entry) linkTarget() (string, error) {
	if e.Linkname == "" || strings.IndexByte(e.Linkname, 0) >= 0 {
		return "", refuse("symbolic link to %q", e.Linkname)
	}
	return e.Linkname, nil
}

// hardlinkTarget checks the target of a hard link; it is a clean path.
func (e *entry) hardlinkTarget() (string, error) {
	clean, err := cleanName(e.Linkname)
	if err != nil {
		return "", &refusal{reason: fmt.Sprintf("hard link to %q: %v", e.Linkname, err)}
	}
	if clean == "." {
		return "", refuse("hard link to %q, which is a directory", e.Linkname)
	}
	return clean, nil
}

// hardlinkBelow is the error for a hard link to what the layer does not have. The layers below may.
func (e *entry) hardlinkBelow() error {
	return fmt.Errorf("%w: hard link to %q, which it does not hold itself", ErrUnsupported, e.Linkname)
}

// device is the type of a special file, and its device number as mknod(2) takes it.
func (e *entry) device() (kind uint32, dev uint64, err error) {
	kind = unix.S_IFIFO
	switch e.Typeflag {
	case tar.TypeChar:
		kind = unix.S_IFCHR
	case tar.TypeBlock:
		kind = unix.S_IFBLK
	}
	if e.Devmajor < 0 || e.Devmajor > math.MaxUint32 || e.Devminor < 0 || e.Devminor > math.MaxUint32 {
		return 0, 0, refuse("device number %d:%d", e.Devmajor, e.Devminor)
	}
	return kind, unix.Mkdev(uint32(e.Devmajor), uint32(e.Devminor)), nil
}

// sparse tells whether the content in the tar is not the content of the file.
func (e *entry) sparse() bool {
	if e.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range e.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func short(err error) error {
	if err == io.EOF {
		return &refusal{reason: "the tar ends within its content", err: io.ErrUnexpectedEOF}
	}
	return err
}
