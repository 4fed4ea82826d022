package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/hearth-serverless/hearth/internal/host"
)

const (
	readyTime   = 5 * time.Minute        // for one program to become ready, on a machine that does much else
	attemptTime = 5 * time.Second        // for one attempt to see whether it is
	pauseTime   = 100 * time.Millisecond // between two
	maxRestarts = 5                      // of a program meanwhile
	maxAnswer   = 4 << 20                // bytes of the API server's answer that are read
)

// await waits until a program of a machine is ready. It gives up when the program has ended too often, or the time is over.
func (c *Cluster) await(ctx context.Context, m machine, name string, ready func(context.Context) error) error {
	waiting, cancel := context.WithTimeout(ctx, readyTime)
	defer cancel()
	before := m.restarts(name)
	for {
		attempt, done := context.WithTimeout(waiting, attemptTime)
		err := ready(attempt)
		done()
		if err == nil {
			return nil
		}
		if m.restarts(name)-before >= maxRestarts || !host.Pause(waiting, pauseTime) {
			return fmt.Errorf("%s on %s does not become ready: %w; the end of its log, %s:\n%s", name, m.name, err, m.log(name), m.lastLines(name))
		}
	}
}

// ask gets a path of the API server as the administrator, and decodes the answer unless into is nil.
func (c *Cluster) ask(ctx context.Context, path string, into any) error {
	client, server, err := administrator(c.Kubeconfig())
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	body, err := fetch(ctx, client, server+path)
	if err != nil || into == nil {
		return err
	}
	return json.Unmarshal(body, into)
}

// administrator is a client for the API server of a kubeconfig that kubeconfig made.
func administrator(path string) (*http.Client, string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, "", err
	}
	var k struct {
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
			}
		}
		Users []struct {
			User struct {
				Cert []byte `json:"client-certificate-data"`
				Key  []byte `json:"client-key-data"`
			}
		}
	}
	if err := json.Unmarshal(text, &k); err != nil {
		return nil, "", fmt.Errorf("read %s: %w", path, err)
	}
	if len(k.Clusters) != 1 || len(k.Users) != 1 {
		return nil, "", fmt.Errorf("read %s: it is not one that a cluster was started with", path)
	}
	cert, err := tls.X509KeyPair(k.Users[0].User.Cert, k.Users[0].User.Key)
	if err != nil {
		return nil, "", fmt.Errorf("read %s: %w", path, err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(k.Clusters[0].Cluster.CA)
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, Certificates: []tls.Certificate{cert}},
	}}, k.Clusters[0].Cluster.Server, nil
}

func get(ctx context.Context, client *http.Client, url string) error {
	_, err := fetch(ctx, client, url)
	return err
}

func fetch(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		text := strings.TrimSpace(string(body[:min(len(body), 1000)]))
		return nil, errors.New(resp.Status + ": " + text)
	}
	return body, nil
}
