// The gateway daemon: the front door of Functions. See package gateway.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/hearth-serverless/hearth/gateway"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/pki"
)

const baseURL = "http://hearth" // whatever it names, a client goes where it was made for

type options struct {
	address     string
	allowRemote bool
	poolSocket  string
	poolAddress string
	tlsDir      string
	domain      string
	name        string
}

func main() {
	o := &options{}
	os.Exit(daemon.Main(daemon.Service{
		Name:  "gateway",
		Short: "Hearth's front door: routes requests to functions and has instances started for them",
		Long: `gateway serves HTTP/1.1 and h2c. A request reaches the function NAME at the host NAME.DOMAIN, at a host that the function
names itself, or below the path /fn/NAME. While no instance is free, requests wait in a bounded queue.`,
		Flags: o.add,
		Run:   o.run,
	}))
}

func (o *options) add(f *pflag.FlagSet) {
	f.StringVar(&o.address, "address", "127.0.0.1:8080", "HOST:PORT to serve functions on")
	f.BoolVar(&o.allowRemote, "allow-remote", false, "serve on an address that other machines reach; anyone there can call every function: there is no authentication yet")
	f.StringVar(&o.poolSocket, "pool-socket", "/run/hearth/pool.sock", "Unix socket of poolmanager")
	f.StringVar(&o.poolAddress, "pool-address", "", "HOST:PORT of poolmanagers on the network, instead of --pool-socket: of all addresses of HOST, the one that leads is asked")
	daemon.TLSDirVar(f, &o.tlsDir)
	f.StringVar(&o.domain, "domain", gateway.DefaultDomain, "functions answer at NAME.DOMAIN")
	f.StringVar(&o.name, "name", "", "this gateway's name among those of the same poolmanager (default: the host's name)")
}

func (o *options) run(ctx context.Context, rt *daemon.Runtime) error {
	listener, err := o.listen(ctx)
	if err != nil {
		return err
	}
	config := gateway.Config{Name: o.subscriber(), Domain: o.domain, Logger: rt.Log, Registerer: rt.Registry}
	from, err := o.connect(&config)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	g, err := gateway.New(config)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	rt.Log.Info("serving functions", "address", listener.Addr().String(), "domain", o.domain, "pool", from)
	rt.Ready.Set("functions", errors.New("poolmanager has not told of its functions yet"))
	work, ctx := errgroup.WithContext(ctx)
	work.Go(func() error { return g.Run(ctx, listener) })
	work.Go(func() error {
		select {
		case <-g.Synced():
			rt.Ready.Set("functions", nil)
		case <-ctx.Done():
		}
		return nil
	})
	return work.Wait()
}

// connect says how poolmanager is reached, and where.
func (o *options) connect(c *gateway.Config) (string, error) {
	if o.poolAddress == "" {
		socket, err := filepath.Abs(o.poolSocket)
		if err != nil {
			return "", fmt.Errorf("pool socket: %w", err)
		}
		c.Pool = gateway.NewRemote(daemon.UnixClient(socket), baseURL)
		return socket, nil
	}
	host, port, err := net.SplitHostPort(o.poolAddress)
	if err != nil {
		return "", fmt.Errorf("pool address %q: want HOST:PORT", o.poolAddress)
	}
	keys, err := pki.OpenDir(o.tlsDir, c.Logger)
	if err != nil {
		return "", err
	}
	c.Patience = gateway.NetworkPatience
	c.Pool = gateway.NewLeader(gateway.LeaderConfig{
		Logger: c.Logger,
		Resolve: func(ctx context.Context) ([]string, error) {
			all, err := net.DefaultResolver.LookupHost(ctx, host)
			for n := range all {
				all[n] = net.JoinHostPort(all[n], port)
			}
			return all, err
		},
		Connect: func(address string) (gateway.Pool, func()) {
			client := daemon.TLSClient(keys, pki.Poolmanager, address)
			return gateway.NewRemote(client, baseURL), client.CloseIdleConnections
		},
	})
	return o.poolAddress, nil
}

func (o *options) listen(ctx context.Context) (net.Listener, error) {
	address, err := net.ResolveTCPAddr("tcp", o.address)
	if err != nil {
		return nil, fmt.Errorf("address %s: %w", o.address, err)
	}
	if !address.IP.IsLoopback() && !o.allowRemote {
		return nil, fmt.Errorf("address %s: other machines would reach it, and there is no authentication yet: "+
			"serve on loopback, or say --allow-remote if whoever gets there may call every function", o.address)
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address.String())
	if err != nil {
		return nil, fmt.Errorf("serve on %s: %w", o.address, err)
	}
	return listener, nil
}

func (o *options) subscriber() string {
	if o.name != "" {
		return o.name
	}
	if host, err := os.Hostname(); err == nil && host != "" {
		return host
	}
	return "gateway"
}
