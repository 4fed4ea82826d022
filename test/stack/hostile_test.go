package stack_test

import (
	"archive/tar"
	"bytes"
	"compress/flate"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash/crc32"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// hostile is an image with one layer that must be refused.
type hostile struct {
	layer v1.Layer
	// why is in the error, beside the layer.
	why string
	// wrongDiffID has the image's config tell another diffID than the layer has.
	wrongDiffID bool
	// lie, if set, is what the registry sends instead of the layer.
	lie func(blob []byte) []byte
}

func hostiles(t *testing.T, canary string) map[string]hostile {
	t.Helper()
	layer := func(why string, entries ...entry) hostile {
		return hostile{layer: layerOf(t, tarOf(t, entries...)), why: why}
	}
	good := layerOf(t, tarOf(t, file("data", strings.Repeat("what a registry may spoil ", 1<<14))))
	up := strings.Repeat("../", 12) + strings.TrimPrefix(canary, "/")
	dir, base := filepath.Dir(canary), filepath.Base(canary)
	half := func(b []byte) []byte { return b[:len(b)/2] }
	return map[string]hostile{
		"corrupt blob":                  {layer: good, why: "digest mismatch", lie: corrupt},
		"truncated body":                {layer: good, why: "shorter", lie: half},
		"wrong diffID":                  {layer: good, why: "diffID mismatch", wrongDiffID: true},
		"decompression bomb":            {layer: bomb(t), why: "--layer-max-ratio"},
		"not a tar":                     {layer: layerOf(t, []byte(strings.Repeat("no tar at all ", 1000))), why: "tar"},
		"not even what it calls itself": {layer: static.NewLayer([]byte("plain words"), types.DockerLayer), why: "tar"},

		"name climbs":              layer("climbs out", file(up, "harm")),
		"name is absolute":         layer("absolute path", file(canary, "harm")),
		"symbolic link leads out":  layer("symbolic link", link(tar.TypeSymlink, "out", dir), file("out/"+base, "harm")),
		"symbolic link climbs out": layer("symbolic link", link(tar.TypeSymlink, "out", filepath.Dir(up)), file("out/"+base, "harm")),
		"hard link leads out":      layer("absolute path", link(tar.TypeLink, "in", canary), file("in", "harm")),
		"hard link climbs out":     layer("climbs out", link(tar.TypeLink, "in", up), file("in", "harm")),
		"hard link by a link":      layer("symbolic link", link(tar.TypeSymlink, "out", dir), link(tar.TypeLink, "in", "out/"+base)),
		"white-out by a link":      layer("symbolic link", link(tar.TypeSymlink, "out", dir), file("out/.wh."+base, "")),
	}
}

// corrupt changes one bit of gzip's header that nothing depends on but the digest.
func corrupt(blob []byte) []byte {
	out := slices.Clone(blob)
	out[9] ^= 1 // the operating system, by RFC 1952
	return out
}

// bomb is a tar of 300 MB of zeros, a thousandth of that compressed.
func bomb(t *testing.T) v1.Layer {
	t.Helper()
	const size = 300 << 20
	var head bytes.Buffer
	w := tar.NewWriter(&head)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Mode: 0o644, Size: size}); err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 1<<20)
	var out bytes.Buffer
	plain, sum := sha256.New(), crc32.NewIEEE()
	out.Write([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}) // RFC 1952
	stretch := func(data []byte, times int) {
		packed := deflated(t, data)
		for range times {
			_, _ = io.MultiWriter(plain, sum).Write(data)
			out.Write(packed)
		}
	}
	stretch(head.Bytes(), 1)
	stretch(zeros, size/len(zeros))
	stretch(zeros[:1024], 1)             // the end of the tar
	out.Write([]byte{1, 0, 0, 255, 255}) // the last block, empty
	out.Write(binary.LittleEndian.AppendUint32(nil, sum.Sum32()))
	out.Write(binary.LittleEndian.AppendUint32(nil, uint32(head.Len()+size+1024)))
	return bombLayer{static.NewLayer(out.Bytes(), types.DockerLayer), hex.EncodeToString(plain.Sum(nil))}
}

// deflated ends at a byte's boundary and refers to nothing before it, so that it can be repeated.
func deflated(t *testing.T, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := flate.NewWriter(&out, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// bombLayer knows its diffID, so that it is refused for nothing but its size.
type bombLayer struct {
	v1.Layer
	diffID string
}

func (b bombLayer) DiffID() (v1.Hash, error) { return v1.Hash{Algorithm: "sha256", Hex: b.diffID}, nil }

// TestHostileImages deploys images that must not be had, by both ways in which the CRI pulls. The error names the layer, nothing
// of it stays, nothing outside of it is touched, it is not left to containerd to try, and others are served as before.
func TestHostileImages(t *testing.T) {
	for name, local := range map[string]bool{"transfer": false, "local": true} {
		t.Run(name, func(t *testing.T) {
			d := start(t, func(c *stack.Config) { c.LocalPull = local })
			d.mustDeploy(t, "good", d.pushGo(t))
			canary := filepath.Join(d.config.Root, "canary")
			if err := os.WriteFile(canary, []byte("alive"), 0o640); err != nil {
				t.Fatal(err)
			}
			for what, h := range hostiles(t, canary) {
				t.Run(what, func(t *testing.T) { d.refuses(t, h, canary) })
			}
			d.web.answersBy(t, "good", time.Now().Add(recovery))
			d.settles(t)
		})
	}
}

// refuses deploys a hostile image and asks for it.
func (d *deployment) refuses(t *testing.T, h hostile, canary string) {
	before, gaveUp := fingerprint(t, canary), d.fallbacks(t)
	digest := digestOf(t, h.layer)
	image, diffID := d.serve(t, h)
	err := d.deploy(t, "bad", image, true)
	if err == nil || !strings.Contains(err.Error(), digest) || !strings.Contains(err.Error(), h.why) {
		t.Errorf("deploy does not name layer %s and say %q: %v", digest, h.why, err)
	}
	d.refusesRequest(t, digest)
	d.nothingStays(t, diffID)
	if after := fingerprint(t, canary); after != before {
		t.Errorf("a file outside changed from %s to %s", before, after)
	}
	if now := d.fallbacks(t); !slices.Equal(now, gaveUp) {
		t.Errorf("the layer was left to containerd: %v, before %v", now, gaveUp)
	}
}

// TestPullIsCutOff breaks the connection in the middle of a layer, each time. That is no fault of the layer: containerd is let
// try, and does not get it either.
func TestPullIsCutOff(t *testing.T) {
	d := start(t)
	layer := noiseLayer(t, 3, 100)
	digest := digestOf(t, layer)
	server := spoil(t, digest, func(w http.ResponseWriter, _ *http.Request, blob []byte) {
		w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
		_, _ = w.Write(blob[:len(blob)/2])
		panic(http.ErrAbortHandler)
	})
	image := push(t, server.Listener.Addr().String(), "bad", withLayers(t, goImage(t), layer))
	began := time.Now()
	if err := d.deploy(t, "bad", image, true); err == nil || !strings.Contains(err.Error(), digest) {
		t.Errorf("deploy does not name layer %s: %v", digest, err)
	}
	t.Logf("refused after %v", time.Since(began).Round(time.Millisecond))
	d.remove(t, "bad")
	d.settles(t)
}

// fallbacks are the snapshotter's counters of layers that it left to containerd.
func (d *deployment) fallbacks(t *testing.T) (out []string) {
	t.Helper()
	client := daemon.UnixClient(filepath.Join(d.config.Run, "admin-nodeagent.sock"))
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://hearth/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "hearth_snapshotter_prepares_total{") {
		t.Fatal("nodeagent does not count snapshots")
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "hearth_snapshotter_fallbacks_total{") {
			out = append(out, line)
		}
	}
	return out
}

// refusesRequest asks the Function, if the deploy left it there.
func (d *deployment) refusesRequest(t *testing.T, digest string) {
	t.Helper()
	a, err := d.web.get(t.Context(), "bad", "/")
	if err != nil {
		t.Fatal(err)
	}
	if a.code == http.StatusNotFound {
		return
	}
	refused(t, a, nil, http.StatusServiceUnavailable, true, digest)
	d.remove(t, "bad")
}

func fingerprint(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	links := strings.Repeat("+", int(info.Sys().(*syscall.Stat_t).Nlink))
	return info.Mode().String() + " " + info.ModTime().String() + " " + links + " " + string(data)
}

func digestOf(t *testing.T, l v1.Layer) string {
	t.Helper()
	h, err := l.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

// serve makes an image of the layer, in a registry of its own that tells the lie, and gives its name and the layer's diffID.
func (d *deployment) serve(t *testing.T, h hostile) (image, diffID string) {
	t.Helper()
	img := withLayers(t, goImage(t), h.layer)
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if h.wrongDiffID {
		config = config.DeepCopy()
		config.RootFS.DiffIDs[len(config.RootFS.DiffIDs)-1].Hex = strings.Repeat("ab", 32)
		if img, err = mutate.ConfigFile(img, config); err != nil {
			t.Fatal(err)
		}
	}
	diffID = config.RootFS.DiffIDs[len(config.RootFS.DiffIDs)-1].Hex
	if h.lie == nil {
		return push(t, d.status.Registry, "bad", img), diffID
	}
	server := spoil(t, digestOf(t, h.layer), func(w http.ResponseWriter, r *http.Request, blob []byte) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(h.lie(blob)))
	})
	return push(t, server.Listener.Addr().String(), "bad", img), diffID
}

// spoil is a registry that keeps what it is given, and has one blob sent by another.
func spoil(t *testing.T, digest string, send func(w http.ResponseWriter, r *http.Request, blob []byte)) *httptest.Server {
	t.Helper()
	quiet := log.New(io.Discard, "", 0)
	honest := registry.New(registry.Logger(quiet))
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/blobs/"+digest) {
			honest.ServeHTTP(w, r)
			return
		}
		whole := r.Clone(r.Context())
		whole.Header.Del("Range")
		kept := httptest.NewRecorder()
		honest.ServeHTTP(kept, whole)
		send(w, r, kept.Body.Bytes())
	}))
	server.Config.ErrorLog = quiet
	server.Start()
	t.Cleanup(server.Close)
	return server
}

// nothingStays waits until the snapshotter has neither an unfinished tree nor one of the diffID.
func (d *deployment) nothingStays(t *testing.T, diffID string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), settling)
	defer cancel()
	for {
		staged, err := filepath.Glob(filepath.Join(d.snapshotterDir("staging"), "*"))
		if err != nil {
			t.Fatal(err)
		}
		kept, err := filepath.Glob(filepath.Join(d.snapshotterDir("layers"), "*"+diffID+"*"))
		if err != nil {
			t.Fatal(err)
		}
		if len(staged)+len(kept) == 0 {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("still there after %v: %v %v", settling, staged, kept)
		}
		nap(ctx, 20*time.Millisecond)
	}
}
