package registry_test

import (
	"io"
	"log"
	"net/http/httptest"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/hearth-serverless/hearth/registry"
)

// An image goes through another implementation's registry and over real
// connections, all layers at once.
func TestRealRegistry(t *testing.T) {
	srv := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	ref := strings.TrimPrefix(srv.URL, "http://") + "/lib/app:1"

	img, err := random.Image(3<<20, 6)
	mustIs(t, err, nil)
	cfg, err := img.ConfigFile()
	mustIs(t, err, nil)
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", runtime.GOARCH
	img, err = mutate.ConfigFile(img, cfg)
	mustIs(t, err, nil)
	idx := mutate.AppendManifests(mutate.IndexMediaType(mutateEmpty(t), "application/vnd.oci.image.index.v1+json"),
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}})
	tag, err := name.ParseReference(ref)
	mustIs(t, err, nil)
	mustIs(t, remote.WriteIndex(tag, idx), nil)

	c := newClient(t, nil, registry.Config{MaxRangeBytes: 512 << 10})
	defer c.Close()
	got, err := c.Image(t.Context(), ref, "")
	mustIs(t, err, nil)
	if want, _ := img.Digest(); got.Digest.String() != want.String() {
		t.Errorf("got manifest %s, want %s", got.Digest, want)
	}
	var all errgroup.Group
	for i, l := range got.Layers {
		if l.DiffID.String() != cfg.RootFS.DiffIDs[i].String() {
			t.Errorf("layer %d has diffID %s", i, l.DiffID)
		}
		all.Go(func() error {
			r, err := c.Open(t.Context(), ref, l)
			if err != nil {
				return err
			}
			defer r.Close()
			v := l.Digest.Verifier()
			if _, err := io.Copy(v, r); err != nil {
				return err
			}
			if !v.Verified() {
				t.Errorf("layer %d: wrong bytes", i)
			}
			return nil
		})
	}
	mustIs(t, all.Wait(), nil)
}

func mutateEmpty(t *testing.T) v1.ImageIndex {
	t.Helper()
	idx, err := random.Index(0, 0, 0)
	mustIs(t, err, nil)
	return idx
}

// cpuTime is what this process, client and registry both, has used so far.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	mustIs(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u), nil)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkOpen(b *testing.B) {
	o := newOrigin()
	l, data := o.addBlob(256 << 20)
	srv := httptest.NewServer(o)
	defer srv.Close()
	c := newClient(b, nil, registry.Config{MaxRangeBytes: registry.DefaultMaxRangeBytes})
	defer c.Close()
	ref := strings.TrimPrefix(srv.URL, "http://") + "/lib/app:1"
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	before := cpuTime(b)
	defer func() { b.ReportMetric((cpuTime(b)-before).Seconds()/float64(b.N), "cpu-s/op") }()
	for b.Loop() {
		r, err := c.Open(b.Context(), ref, l)
		mustIs(b, err, nil)
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, make([]byte, 1<<20))
		if err != nil || n != l.Size {
			b.Fatalf("%d bytes, %v", n, err)
		}
		r.Close()
	}
}

// A consumer that is slower than the network decides how much is fetched ahead, and so how much memory a pull takes.
func BenchmarkOpenHashed(b *testing.B) {
	o := newOrigin()
	l, _ := o.addBlob(256 << 20)
	srv := httptest.NewServer(o)
	defer srv.Close()
	reg := prometheus.NewRegistry()
	c := newClient(b, nil, registry.Config{MaxRangeBytes: registry.DefaultMaxRangeBytes, Registerer: reg})
	defer c.Close()
	ref := strings.TrimPrefix(srv.URL, "http://") + "/lib/app:1"
	b.SetBytes(l.Size)
	before := cpuTime(b)
	defer func() { b.ReportMetric((cpuTime(b)-before).Seconds()/float64(b.N), "cpu-s/op") }()
	for b.Loop() {
		r, err := c.Open(b.Context(), ref, l)
		mustIs(b, err, nil)
		v := l.Digest.Verifier()
		if n, err := io.Copy(v, r); err != nil || n != l.Size || !v.Verified() {
			b.Fatalf("%d bytes, %v", n, err)
		}
		r.Close()
	}
}
