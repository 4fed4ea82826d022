package node_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// entry is a tar entry; what is not set has a default by type.
type entry struct {
	tar.Header
	data string
}

func tarball(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i, e := range entries {
		h := e.Header
		h.Format = tar.FormatPAX
		h.Size = int64(len(e.data))
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1_500_000_000+int64(i), 123_456_789)
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func dirEntry(name string, mode int64, uid int) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode, Uid: uid, Gid: uid}}
}

func fileEntry(name, data string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data: data}
}

func linkEntry(typ byte, name, target string) entry {
	return entry{Header: tar.Header{Typeflag: typ, Name: name, Linkname: target}}
}

func xattr(e entry, key, value string) entry {
	e.PAXRecords = map[string]string{"SCHILY.xattr." + key: value}
	return e
}

// tortureLayers are tars, lowest first, with what unpackers get wrong.
func tortureLayers(t *testing.T) [][]byte {
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	setuid := fileEntry("usr/bin/su", "setuid")
	setuid.Mode, setuid.Uid, setuid.Gid = 0o6755, 1234, 70_000
	device := func(name string, typ byte, major, minor int64) entry {
		return entry{Header: tar.Header{Typeflag: typ, Name: name, Mode: 0o622, Devmajor: major, Devminor: minor}}
	}
	base := tarball(t,
		dirEntry("./", 0o755, 0), dirEntry("etc/", 0o755, 0), dirEntry("tmp/", 0o1777, 0), dirEntry("srv/", 0o2750, 33), dirEntry("srv/data/", 0o700, 33),
		dirEntry("usr/", 0o755, 0), dirEntry("usr/bin/", 0o755, 0), dirEntry("gone/", 0o755, 0), dirEntry("opaque/", 0o755, 0), dirEntry("dev/", 0o755, 0),
		fileEntry("etc/passwd", "root:x:0:0\n"), fileEntry("etc/empty", ""), fileEntry("gone/file", "x"), fileEntry("opaque/below", "x"),
		fileEntry("usr/bin/big", strings.Repeat("hearth ", 700_000)), fileEntry("replaced", "file becomes directory"), fileEntry("srv/data/kept", "k"),
		xattr(fileEntry("usr/bin/ping", "capable"), "security.capability", capability), xattr(fileEntry("etc/tagged", "t"), "user.tag", "value"), setuid,
		linkEntry(tar.TypeLink, "usr/bin/ping2", "usr/bin/ping"), linkEntry(tar.TypeLink, "etc/passwd-", "etc/passwd"),
		linkEntry(tar.TypeSymlink, "bin", "usr/bin"), linkEntry(tar.TypeSymlink, "abs", "/etc/passwd"), linkEntry(tar.TypeSymlink, "dangling", "../../nowhere"),
		device("dev/null", tar.TypeChar, 1, 3), device("dev/loop", tar.TypeBlock, 7, 300), device("dev/pipe", tar.TypeFifo, 0, 0),
		fileEntry(strings.Repeat("long/", 40)+strings.Repeat("n", 150), "long name"),
	)
	change := tarball(t,
		fileEntry(".wh.gone", ""), dirEntry("opaque/", 0o711, 5), fileEntry("opaque/.wh..wh..opq", ""), fileEntry("opaque/above", "y"),
		dirEntry("replaced/", 0o750, 7), fileEntry("replaced/in", "r"), fileEntry("etc/passwd", "root:x:0:0:changed\n"), fileEntry("etc/.wh.empty", ""),
		dirEntry("etc/", 0o750, 3),
	)
	implicit := tarball(t, fileEntry("srv/data/added", "the directories have no entries"), fileEntry("brand/new/path", "nor these"))
	nothing := tarball(t)
	return [][]byte{base, change, implicit, nothing, nothing}
}

// encoding is how a layer travels.
type encoding string

const (
	plain   encoding = "plain"
	gzipped encoding = "gzip"
	zstded  encoding = "zstd"
	lz4ed   encoding = "lz4"
)

func (e encoding) mediaType() types.MediaType {
	if e == plain {
		return "application/vnd.oci.image.layer.v1.tar"
	}
	return types.MediaType("application/vnd.oci.image.layer.v1.tar+" + string(e))
}

func (e encoding) encode(t *testing.T, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	var w io.WriteCloser
	switch e {
	case plain:
		return data
	case gzipped:
		w = gzip.NewWriter(&buf)
	case zstded:
		var err error
		if w, err = zstd.NewWriter(&buf); err != nil {
			t.Fatal(err)
		}
	case lz4ed:
		w = lz4.NewWriter(&buf)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// blobLayer is a v1.Layer of bytes that are there already.
type blobLayer struct {
	blob, tar []byte
	media     types.MediaType
}

func hashOf(b []byte) (v1.Hash, error) { h, _, err := v1.SHA256(bytes.NewReader(b)); return h, err }

func (l blobLayer) Digest() (v1.Hash, error)            { return hashOf(l.blob) }
func (l blobLayer) DiffID() (v1.Hash, error)            { return hashOf(l.tar) }
func (l blobLayer) Size() (int64, error)                { return int64(len(l.blob)), nil }
func (l blobLayer) MediaType() (types.MediaType, error) { return l.media, nil }
func (l blobLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.blob)), nil
}
func (l blobLayer) Uncompressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.tar)), nil
}

// imageOf is an image of these tars, all in one encoding.
func imageOf(t *testing.T, e encoding, tars ...[]byte) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{
		Architecture: "amd64", OS: "linux", RootFS: v1.RootFS{Type: "layers"}, Config: v1.Config{Cmd: []string{"/x"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tar := range tars {
		layer := blobLayer{blob: e.encode(t, tar), tar: tar, media: e.mediaType()}
		if img, err = mutate.Append(img, mutate.Addendum{Layer: layer, MediaType: e.mediaType()}); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

// testRegistry is an in-memory registry on loopback, with faults to switch on.
type testRegistry struct {
	*httptest.Server
	fault atomic.Pointer[func(w http.ResponseWriter, r *http.Request) bool] // handles the request if true
}

func startRegistry(t *testing.T, options ...registry.Option) *testRegistry {
	t.Helper()
	r := &testRegistry{}
	backend := registry.New(append(options, registry.Logger(log.New(io.Discard, "", 0)))...)
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if fault := r.fault.Load(); fault != nil && (*fault)(w, req) {
			return
		}
		backend.ServeHTTP(w, req)
	}))
	t.Cleanup(r.Close)
	return r
}

// push puts an image into the registry and returns the reference to pull it by.
func (r *testRegistry) push(t *testing.T, repo string, img v1.Image) string {
	t.Helper()
	ref, err := name.ParseReference(r.Listener.Addr().String()+"/"+repo, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return ref.Name()
}

// layerDigests are the digests of an image's blobs.
func layerDigests(t *testing.T, img v1.Image) (blobs []v1.Hash) {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		h, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, h)
	}
	return blobs
}
