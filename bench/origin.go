package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/bench/link"
	"github.com/hearth-serverless/hearth/deploy"
)

// origin is where images come from: a registry on loopback, whose blobs are in the page cache for all who ask, and a link of each
// kind before it.
type origin struct {
	o        *Options
	dir      string
	registry *process
	address  string
	// links have an address each. loopback has the registry's own: nothing stands in between.
	links  map[string]string
	cancel context.CancelFunc
	serve  *errgroup.Group
	refs   map[string]string // by repository
}

// startOrigin starts a registry with its data below dir.
func startOrigin(ctx context.Context, o *Options, dir string) (*origin, error) {
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "registry.yaml")
	err = render(config, deploy.Registry, map[string]string{"RegistryRoot": filepath.Join(dir, "registry"), "RegistryAddress": address})
	if err != nil {
		return nil, err
	}
	p, err := startProcess(dir, nil, filepath.Join(o.Tools, "registry"), "serve", config)
	if err != nil {
		return nil, err
	}
	if err := p.await(ctx, "tcp", address); err != nil {
		p.stop()
		return nil, err
	}
	g := &origin{o: o, dir: dir, registry: p, address: address, links: map[string]string{}, refs: map[string]string{}}
	ctx, g.cancel = context.WithCancel(ctx)
	g.serve, ctx = errgroup.WithContext(ctx)
	for name, speed := range link.Named() {
		if speed == (link.Speed{}) {
			g.links[name] = address
			continue
		}
		front, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return nil, errors.Join(fmt.Errorf("listen for link %s: %w", name, err), g.stop())
		}
		g.links[name] = front.Addr().String()
		g.serve.Go(func() error { return link.New(speed).Serve(ctx, front, address) })
	}
	return g, nil
}

func (g *origin) stop() error {
	g.cancel()
	err := g.serve.Wait()
	g.registry.stop()
	return errors.Join(err, os.RemoveAll(filepath.Join(g.dir, "registry")))
}

// ref of a case's image over the case's link; it is pushed the first time.
func (g *origin) ref(ctx context.Context, c pullCase) (string, error) {
	repository := c.image + "-" + c.encoding
	if g.refs[repository] == "" {
		layout, err := g.layout(ctx, c)
		if err != nil {
			return "", err
		}
		if _, err := images.Push(ctx, layout, g.address+"/"+repository+":1"); err != nil {
			return "", err
		}
		if c.encoding == siblings {
			if err := g.o.accelerate(ctx, g.address+"/"+repository+":1"); err != nil {
				return "", err
			}
		}
		g.refs[repository] = repository + ":1"
	}
	return g.links[c.link] + "/" + g.refs[repository], nil
}

// layout of a case's image: one of ours, or one that another registry has.
func (g *origin) layout(ctx context.Context, c pullCase) (layout string, err error) {
	if g.o.Image != "" && c.image == foreignName(g.o.Image) {
		layout, err = images.Fetch(ctx, g.o.images(), c.image, g.o.Image)
	} else {
		layout, err = images.Build(ctx, g.o.images(), c.image)
	}
	if err != nil || c.encoding == siblings {
		return layout, err
	}
	return images.Encode(ctx, g.o.images(), c.image, layout, images.Encoding(c.encoding))
}

// sent is how many bytes the registry has written since it started: nearly all of them to those who pull.
func (g *origin) sent() (float64, error) { return written(g.registry.cmd.Process.Pid) }
